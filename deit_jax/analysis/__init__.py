"""Answers of trained weights, and views into them. For notebooks: the functions of `attention`."""

from deit_jax.analysis.attention import (
    attention_maps,
    disagreement,
    learned_cosine,
    patch_filters,
    position_similarity,
    rollout,
    token_cosines,
    token_features,
)

__all__ = [
    "attention_maps",
    "disagreement",
    "learned_cosine",
    "patch_filters",
    "position_similarity",
    "rollout",
    "token_cosines",
    "token_features",
]
