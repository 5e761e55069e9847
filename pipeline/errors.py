"""The one kind of error that a user can fix."""


class UserError(ValueError):
    """The text is one sentence: what was found, what was expected, what to do. Commands end with exit code 2."""
