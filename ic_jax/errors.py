"""The one exception that means "the user can mend this": commands print it as a single line and exit with status 2."""


class UserError(ValueError):
    """A mistake in input, flags or files; the message says what, why and how to mend it."""
