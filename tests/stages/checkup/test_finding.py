from pathlib import Path

import pytest

from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.errors import UserError
from cedm_ray.stages.checkup.finding import Finding, merged, refuse_failures
from cedm_ray.stages.checkup.quick import quick_findings


@pytest.mark.parametrize(
    ("said", "text", "fix"),
    [
        ("X is 3; it must be at least 4: do Y", "X is 3; it must be at least 4", "do Y"),
        ("A is wrong; do B", "A is wrong", "do B"),
        ("A is wrong; pass a file with it: --weights FILE", "A is wrong", "pass a file with it: --weights FILE"),
        ("cifar10 is not in data: put it there", "cifar10 is not in data", "put it there"),
        ("s3://bucket is empty", "s3://bucket is empty", ""),
    ],
)
def test_the_line_of_an_error_is_taken_apart(said: str, text: str, fix: str) -> None:
    assert Finding.refused("data", UserError(said)) == Finding("data", "fail", text, fix)


def test_the_first_failure_ends_the_search_in_one_line() -> None:
    well, bad = Finding("disk", "ok", "1 GB free"), Finding("storage", "fail", "/x cannot be written", "give another")
    refuse_failures([well, Finding("token", "warn", "others may read it", "chmod 600 it")])
    with pytest.raises(UserError) as caught:
        refuse_failures([well, bad, Finding("tracking", "fail", "no", "yes")])
    assert str(caught.value) == "storage: /x cannot be written; give another"
    with pytest.raises(UserError, match=r"^data: s3://bucket is empty$"):
        refuse_failures([Finding("data", "fail", "s3://bucket is empty")])


def test_one_node_is_not_named_and_of_several_those_that_differ_are() -> None:
    well, bad = Finding("disk", "ok", "9 GB free"), Finding("disk", "fail", "1 GB free", "make room")
    ports = Finding("ports", "ok", "on loopback")
    assert merged([("a", [well, ports])]) == [well, ports]
    lines = merged([("a", [ports, well]), ("b", [bad]), ("c", [well]), ("d", [bad])])
    assert [(each.name, each.level, each.text) for each in lines] == [
        ("ports", "ok", "a: on loopback"),
        ("disk", "ok", "a: 9 GB free (as on 1 more)"),
        ("disk", "fail", "b: 1 GB free"),
        ("disk", "fail", "d: 1 GB free"),
    ]
    assert lines[-1].fix == "make room"


def test_the_quick_checks_are_all_made_once_and_leave_nothing(tmp_path: Path) -> None:
    found = quick_findings(load(["--storage-path", str(tmp_path / "runs")]), digits())
    names = ["versions", "shared memory", "open files", "local disk", "token", "storage", "disk", "tracking"]
    assert [finding.name for finding in found] == names and list(tmp_path.iterdir()) == []
    assert all((finding.level == "ok") == (finding.fix == "") and "\n" not in finding.text for finding in found)


def test_a_server_is_left_to_the_checks_with_a_network_and_unknown_images_to_the_search(tmp_path: Path) -> None:
    flags = ["--storage-path", str(tmp_path), "--tracking-uri", "http://127.0.0.1:9"]
    found = quick_findings(load([*flags, "--dataset", "/no/where", "--resolution", "8"]))
    assert not {"tracking", "disk"} & {finding.name for finding in found}
