"""Label tapes: what a teacher said of every example of a run."""
