"""A run: config resolved once, loop, evaluation, label tapes."""
