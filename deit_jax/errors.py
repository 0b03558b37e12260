"""The error a user can cause and cure."""


class UserError(Exception):
    """Say in one line what is wrong (file, key or value) and what to do about it."""


EXIT_CODE = 75  # of Interrupted; EX_TEMPFAIL of sysexits.h: run the same command again


class Interrupted(Exception):
    """A run stopped as it was asked to; the same command continues it."""
