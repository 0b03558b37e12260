"""Teachers of any kind: a pure function, its parameters, and what its images must be."""
