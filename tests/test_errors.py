"""What of an error is shown in a line of our own."""

import pytest

from cedm_ray.errors import first_line


@pytest.mark.parametrize(
    ("error", "said", "named"),
    [
        (ValueError("\n  the first \nthe second"), "the first", "ValueError: the first"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (RuntimeError(" \n "), "RuntimeError", "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_what_it_says_or_else_its_class(error: Exception, said: str, named: str) -> None:
    assert first_line(error) == said and first_line(error, named=True) == named


def test_a_long_line_is_cut() -> None:
    error = OSError("x" * 900)
    assert first_line(error) == "x" * 200 and first_line(error, 3) == "xxx" and first_line(error, None) == "x" * 900
