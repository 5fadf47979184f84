"""The error that stands for a user's mistake, as opposed to a bug."""


class UserError(ValueError):
    """One sentence that says what was expected and what came.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
