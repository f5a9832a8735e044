"""Where a search keeps what it makes: a folder, or the copy of a bucket in one."""

from pathlib import Path

from cedm_ray.errors import UserError

DEFAULT_COPIES_FOLDER = Path("~/.cache/cedm_ray")
"""Folder for the copies of buckets, where no other is given."""
BUCKET_PART = "s3:"
"""Part of a path below which the copy of a bucket lies: ``<copies>/s3:/bucket/prefix`` is that of s3://bucket/prefix."""


def storage_folder(path: Path, copies: Path) -> Path:
    """The folder of a storage path on this machine: for ``s3://bucket/prefix`` that of its copy, absolute.

    Args:
        path: A folder, ``file:///folder`` or ``s3://bucket/prefix``, of which a ``Path`` keeps one slash.
        copies: Folder for the copies of buckets.

    Returns:
        The folder; a path that is no URI as it was given.

    Raises:
        UserError: If the scheme is another, or the URI holds keys or options.
    """
    scheme, separator, rest = f"{path}/".partition(":/")
    rest = rest.strip("/")
    if not separator or "/" in scheme:
        return path
    if scheme == "file":
        return Path("/") / rest
    if scheme != "s3":
        raise UserError(
            f"storage path {scheme}://{rest} has the scheme {scheme!r}; it must be a folder, file:///... or s3://..."
        )
    bucket = rest.split("/")[0]
    if not bucket or "@" in bucket or "?" in rest:
        raise UserError(
            f"storage path s3://{bucket.rpartition('@')[2].partition('?')[0]} must be s3://bucket/prefix and no more; "
            "give keys, region and endpoint in the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...)"
        )
    return copies.expanduser().absolute() / BUCKET_PART / rest
