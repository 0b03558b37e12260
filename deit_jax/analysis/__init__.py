"""What trained weights answer and look at. The functions for notebooks are those of `attention`."""

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
