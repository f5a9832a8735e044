from pathlib import Path

import pytest

from cedm_ray.data.storage import BUCKET_PART, storage_folder
from cedm_ray.errors import UserError

COPIES = Path("/copies")


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("runs", "runs"),
        ("/mnt/runs", "/mnt/runs"),
        ("a/b:/c", "a/b:/c"),  # no scheme has a slash in it
        ("file:///mnt/runs", "/mnt/runs"),
        ("s3://bucket", f"/copies/{BUCKET_PART}/bucket"),
        ("s3://bucket/a/b/", f"/copies/{BUCKET_PART}/bucket/a/b"),
    ],
)
def test_a_storage_path_is_a_folder_or_the_copy_of_a_bucket(given: str, folder: str) -> None:
    assert storage_folder(Path(given), COPIES) == Path(folder)


def test_the_folder_of_a_copy_is_absolute_and_lies_in_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert storage_folder(Path("s3://bucket/x"), Path("~/copies")) == Path(f"/home/me/copies/{BUCKET_PART}/bucket/x")
    assert storage_folder(Path("s3://bucket/x"), Path("copies")).is_absolute()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "gs://bucket/x",
            "storage path gs://bucket/x has the scheme 'gs'; it must be a folder, file:///... or s3://...",
        ),
        ("s3://", "storage path s3:// must be s3://bucket/prefix and no more"),
        ("s3://me:hush@bucket/x", "storage path s3://bucket must be s3://bucket/prefix and no more"),
        ("s3://bucket/x?region=eu", "give keys, region and endpoint in the environment"),
        ("s3://bucket?secret=hush", "storage path s3://bucket must be"),
    ],
)
def test_another_scheme_keys_and_options_are_refused_and_keys_are_not_repeated(given: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        storage_folder(Path(given), COPIES)
    assert message in str(caught.value) and "hush" not in str(caught.value)
