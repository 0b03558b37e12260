"""The fields that a config may hold, its JSON, and the places of its files."""
