"""The errors that are meant for the person who started the program."""

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """A text from a stranger, such as a file's name, without what would break a line or steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class UserError(ValueError):
    """A mistake that the user can put right: one line with the value, the bound and the way out.

    The command line prints the message alone, without a traceback, and ends with exit status 2. It may hold names
    and values that strangers have chosen; what is not printable in them is escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def require(ok: bool, name: str, value: object, bound: str) -> None:
    """Refuse a setting that is out of its bound.

    Raises:
        ValueError: With the name, the value and the bound, unless ``ok``.
    """
    if not ok:
        raise ValueError(f"{name} is {value}; it must {bound}")


def one_line(text: object) -> str:
    """What a library says, in one line."""
    return " ".join(str(text).split())


def first_line(error: BaseException, limit: int | None = 200, *, named: bool = False) -> str:
    """What an error says in its first line; the name of its class where it says nothing.

    Args:
        error: Whatever was raised.
        limit: Characters at the most (None: all of them).
        named: Put the name of its class before it.
    """
    kind = type(error).__name__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (f"{kind}: {said}" if said and named else said or kind)[:limit]


def did_you_mean(word: str, known: Iterable[str], n: int = 1) -> str:
    """The end of a line about an unknown name: ``; did you mean gamma?``, or nothing where none is like it.

    Args:
        word: What was given.
        known: The names that there are.
        n: How many are offered at the most, the nearest first.
    """
    close = difflib.get_close_matches(word, list(known), n=n)
    return f"; did you mean {' or '.join(close)}?" if close else ""
