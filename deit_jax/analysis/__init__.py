"""Answers of trained weights, and views into them. For notebooks: the functions of `attention`."""

__all__ = [
    "attention_maps",
    "attention_on_image",
    "disagreement",
    "learned_cosine",
    "patch_filters",
    "position_similarity",
    "rollout",
    "token_cosines",
    "token_features",
]


def __getattr__(name: str):
    """Import `attention` on first use, so that what needs no JAX loads none."""
    if name not in __all__:
        raise AttributeError(f"module 'deit_jax.analysis' has no attribute {name!r}")
    from deit_jax.analysis import attention

    return getattr(attention, name)
