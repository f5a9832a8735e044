"""The file systems of Arrow behind URIs, with a bounded wait and without keys that would be written down."""

import subprocess
import sys
import urllib.parse
from pathlib import Path

from pyarrow import ArrowException, fs

from cedm_ray.errors import UserError, one_line

SCHEMES = ("s3", "gs", "file")
_TIMEOUT_S = 60.0  # for the first answer of a store
_RETRY_GS_S = 15  # Google's client would try for 15 minutes
_ASK = """
import sys
from pyarrow import fs
try:
    filesystem, path = fs.FileSystem.from_uri(sys.stdin.read())
    filesystem.get_file_info(path)
except Exception as error:
    print(error)
    sys.exit(1)
"""


def open_filesystem(uri: str, *, timeout_s: float = _TIMEOUT_S) -> tuple[fs.FileSystem, fs.FileInfo, str]:
    """The file system behind ``s3://bucket/path`` or ``gs://bucket/path``, once it has answered.

    Credentials are taken from where Arrow takes them: the environment, the user's configuration, or the machine's role,
    but not from the URI, which is written down with the settings. Options go behind a question mark, for example
    ``?region=eu-central-1``.

    Args:
        uri: What is asked for.
        timeout_s: Seconds until a store that is silent is given up.

    Returns:
        The file system, what it says of the path, and what to put before a path in messages.

    Raises:
        UserError: If the scheme is another, the URI holds keys, or the store cannot be reached, refuses, or does not
            have the path.
    """
    parts = _split(uri)
    user, _, bucket = parts.netloc.rpartition("@")
    shown = f"{parts.scheme}://{bucket}{parts.path}"
    if parts.scheme not in ("s3", "gs"):
        raise UserError(f"{shown} has the scheme {parts.scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if ":" in user:
        raise UserError(
            f"the URI of {shown} holds keys, which would be written down with the settings; give them in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and take them out of the URI"
        )
    if parts.scheme == "gs" and "retry_limit_seconds" not in parts.query:
        query = f"{parts.query}&retry_limit_seconds={_RETRY_GS_S}".lstrip("&")
        uri = urllib.parse.urlunsplit(parts._replace(query=query))
    knock(uri, shown, timeout_s)
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        info = filesystem.get_file_info(path)
    except (OSError, ArrowException) as error:
        raise unreachable(shown, error) from error
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{shown} does not exist; correct the bucket, the path or the region")
    return filesystem, info, f"{parts.scheme}://"


def local_path(uri: str) -> Path | None:
    """The path behind ``file:///path``; None for any other scheme.

    Raises:
        UserError: If the URI names another machine.
    """
    parts = _split(uri)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{uri} names the machine {parts.netloc!r}; write file:///path with three slashes")
    return Path(urllib.parse.unquote(parts.path))


def unreachable(where: str, error: Exception | str, doing: str = "read") -> UserError:
    """The one line for whatever a store or its client says."""
    said = one_line(error)[:300]
    return UserError(f"{where} cannot be {doing} ({said}); look at the network, the credentials and the region")


def _split(uri: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(uri)
    except ValueError as error:
        raise UserError(f"the dataset is no valid URI ({error}); write scheme://bucket/path") from error


def knock(uri: str, shown: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Ask for the path in a process of its own, which can be ended.

    Arrow's clients take no timeout in a URI, and one that waits for a silent store keeps its process from ending.

    Raises:
        UserError: If the store is silent or refuses.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", _ASK], input=uri, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{shown} has not answered for {timeout_s:g} s; look at the network, the endpoint and the region"
        ) from error
    if child.returncode == 0:
        return
    raise unreachable(shown, child.stdout or f"the client ended with status {child.returncode}")
