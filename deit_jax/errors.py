"""The error a user can cause and cure."""


class UserError(Exception):
    """Say in one line what is wrong (file, key or value) and what to do about it."""
