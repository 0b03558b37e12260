"""From image files to augmented uint8 batches: a pure function of (seed, step)."""
