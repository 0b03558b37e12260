"""The figures of runs as a page to read in a browser."""
