"""What a machine has for training, and what it lacks: `deit doctor`."""
