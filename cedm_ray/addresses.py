"""Addresses as they may be shown and kept."""

from __future__ import annotations

import re


def without_credentials(text: str) -> str:
    """A text without the names and passwords that are part of its URIs."""
    return re.sub(r"//[^/@\s]+@", "//", text)
