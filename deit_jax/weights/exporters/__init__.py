"""One file, one format that weights are written in."""
