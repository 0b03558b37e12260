"""DeiT in JAX/Flax: see README.md for the commands, docs/design.md for the architecture."""

__version__ = "0.2.0"
__all__ = [
    "Teacher",
    "__version__",
    "create_model",
    "features",
    "list_models",
    "load",
    "preprocess",
    "write_teacher",
]

_API = {
    "Teacher": "deit_jax.teachers.teacher",
    "create_model": "deit_jax.models.registry",
    "features": "deit_jax.analysis.features",
    "list_models": "deit_jax.models.registry",
    "load": "deit_jax.weights.load",
    "preprocess": "deit_jax.data.preprocess",
    "write_teacher": "deit_jax.teachers.folder",
}


def __getattr__(name: str):
    """Import the public functions on first use, so that `deit --help` does not load JAX."""
    if name not in _API:
        raise AttributeError(f"module 'deit_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_API[name]), name)
