"""A knock at a web server's door."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Literal

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """How a server answers."""

    status: int
    content_type: str
    """For example ``application/json``."""


def answer_of(url: str, method: Literal["GET", "HEAD"] = "GET") -> Answer:
    """How a server answers a client that it does not know.

    Args:
        url: What to ask for.
        method: ``HEAD`` where the body is large.

    Raises:
        OSError: If nothing answers within ``TIMEOUT_S``, or no HTTP.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=TIMEOUT_S) as answer:
            return Answer(int(answer.status), answer.headers.get_content_type())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers.get_content_type())
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
    except (HTTPException, ValueError) as error:  # speaks another language than HTTP; or the URL is none
        raise OSError(f"{type(error).__name__}: {error}") from error
