"""What a run keeps on disk: lock, history, metrics, checkpoints."""
