"""A run on disk: lock, history, metrics, checkpoints."""
