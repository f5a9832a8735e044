"""The errors that are meant for the person who started the program."""


class UserError(ValueError):
    """A mistake that the user can put right: one line with the value, the bound and the way out.

    The command line prints the message alone, without a traceback, and ends with exit status 2.
    """


def require(ok: bool, name: str, value: object, bound: str) -> None:
    """Refuse a setting that is out of its bound.

    Raises:
        ValueError: With the name, the value and the bound, unless ``ok``.
    """
    if not ok:
        raise ValueError(f"{name} is {value}; it must {bound}")
