"""Weights from a library's hub: from its cache, or from the network where that answers."""

import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from cedm_ray.errors import UserError


@contextmanager
def fetching(what: str, way_out: str) -> Iterator[None]:
    """Fetch inside this: quick where there is no network, and quiet but for one line that says what to do.

    Args:
        what: What is fetched, in the plural, for the message.
        way_out: What to do where it cannot be fetched.

    Raises:
        UserError: In place of whatever is raised inside.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the error below says it in one line
    try:
        with _offline_unless_reachable():
            yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever the network library raised
        raise UserError(f"{what} cannot be fetched ({type(error).__name__}); {way_out}") from error
    finally:
        logger.setLevel(level)


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Look in the hub's cache alone where the hub does not answer: its own retries take a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
