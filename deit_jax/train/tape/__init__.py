"""Label tapes: what a teacher said of every example of a run."""

SAMPLES, LEAST = 10, 99.0  # steps that `deit tape check` compares, percent that must be the same
