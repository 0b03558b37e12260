"""One update, as pure functions: read this folder to know the method."""
