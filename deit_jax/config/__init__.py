"""What a config may hold, its JSON, and where its files are."""
