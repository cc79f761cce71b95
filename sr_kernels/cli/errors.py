"""What ends a command. The message is a sentence for the user."""


class UsageError(Exception):
    """The command line itself is wrong: exit status 2."""


class Failure(Exception):
    """The command is right, but it could not be done: exit status 1."""
