"""The one exception that means "the user can mend this": commands print it as a single line and exit with status 2."""


class UserError(ValueError):
    """A mistake in input, flags or files; the message says what, why and how to mend it."""


def not_finite(what: str) -> UserError:
    """The UserError for logits that are NaN or infinite; ``what`` says whose."""
    return UserError(
        f"the logits of {what} are not finite: most likely weights of the checkpoint are NaN or infinite, or its FP8 scales "
        "are wrong; ic-jax eval audit names the layer"
    )
