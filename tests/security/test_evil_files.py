"""Files that mean harm, given to the programs as a user would: one line, status 2, nothing run, little memory taken."""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

PROGRAMS = {
    "search": "search",
    "evaluate": "evaluate",
    "sample": "sample",
    "report": "report.__main__",
    "doctor": "doctor",
}
DEEP = "[" * 100_000 + "]" * 100_000
MANY_DIGITS = "9" * 10_000
LAUGHS = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in pairwise("abcdefghijkl"))
EVIL_NAME = "a\x1b[31m\n$(touch trapped);`touch trapped`\u202egnp.png"
MOST_MEMORY = 800 * 2**20
"""That may be taken on top: an archive may expand to 512 MiB."""


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


Refused = Callable[..., str]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trapped"


@pytest.fixture
def refused(canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a program and gives the one line that it ends with."""

    def run(program: str, *flags: object) -> str:
        storage = ["--storage-path", str(tmp_path / "runs")] if program not in ("sample", "report") else []
        before, started_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        status = import_module(f"cedm_ray.{PROGRAMS[program]}").main([*map(str, flags), *storage])
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        error = capsys.readouterr().err
        assert (status, error.count("\n"), error[:7]) == (2, 1, "error: "), error
        assert error[:-1].isprintable(), error
        assert not canary.exists() and not list(tmp_path.rglob("trapped"))
        assert taken < MOST_MEMORY and time.monotonic() - started_s < 60
        return error

    return run


def test_the_trap_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Trap(canary)))
    assert canary.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/object/apply:os.mkdir [trapped]", "is not plain YAML"),
        ("a: " + "[" * 5_000, "nested too deep"),
        (f"num_neighbors: {MANY_DIGITS}", "is not plain YAML"),
        ("num_neighbors: 1e400", "valid integer"),
        (LAUGHS, "is not a setting"),
        ("a: &a [*a]\ndataset: *a", "dataset is"),
        ('"\\e[31mevil\\n\\u202e": 1', r"\x1b[31mevil\n\u202e is not a setting"),
        ('backbone: "\\e[31mevil\\nx"', "is unknown"),
    ],
    ids=["tag", "deep", "digits", "infinite", "laughs", "recursive", "key", "value"],
)  # fmt: skip
def test_a_search_space_is_plain_settings_or_refused(text: str, said: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "space.yaml").write_text(text)
    assert said in refused("search", "--search-space", tmp_path / "space.yaml")
    if "backbone" not in text:  # the doctor tells it as a finding among others
        refused("doctor", "--search-space", tmp_path / "space.yaml")


def cifar_archive(folder: Path, name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        member.size = len(content) if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(content))
    return folder


def test_pickles_of_cifar_run_nothing(canary: Path, tmp_path: Path, refused: Refused) -> None:
    evil = pickle.dumps({b"data": Trap(canary)}, protocol=2)
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    payloads = [
        evil,
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    ]
    for content, said in zip(payloads, ("posix.mkdir", "truncated", "MemoryError", "MemoryError"), strict=True):
        for number in range(1, 6):
            (batches / f"data_batch_{number}").write_bytes(content)
        assert said in refused("search", "--dataset", "cifar10", "--data-dir", tmp_path / "data")
    for name, content, kind, said in (
        ("../evil", b"x", tarfile.REGTYPE, "leads out of the archive"),
        ("/etc/evil", b"x", tarfile.REGTYPE, "leads out of the archive"),
        ("data_batch_1", b"", tarfile.SYMTYPE, "is a link"),
        ("data_batch_1", b"", tarfile.LNKTYPE, "is a link"),
        ("data_batch_1", b"", tarfile.CHRTYPE, "a device"),
    ):
        folder = cifar_archive(tmp_path / f"tar-{name.replace('/', '-')}-{kind.decode()}", name, content, kind)
        assert said in refused("search", "--dataset", "cifar10", "--data-dir", folder)


def test_an_archive_that_expands_without_end_is_left(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(40 * gzip.compress(bytes(2**24)))
    assert "unpacks to more than 512 MiB" in refused("search", "--dataset", "cifar10", "--data-dir", tmp_path)


def weight_files(canary: Path, folder: Path) -> list[Path]:
    """Weights that hold a trap, or a header that claims what is not there."""
    torch.save(Trap(canary), folder / "object.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Trap(canary)}, folder / "beside.pth")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    plain = {
        "pickle.pth": pickle.dumps(Trap(canary)), "pickle.safetensors": pickle.dumps(Trap(canary)),
        "deep.safetensors": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        "long.safetensors": struct.pack("<Q", 2**62) + b"{}",
        "shape.safetensors": struct.pack("<Q", len(header)) + header + b"1234",
    }  # fmt: skip
    for name, content in plain.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", pickle.dumps({"a": 1}, protocol=2))
        bomb.writestr("archive/version", "3\n")
        bomb.writestr("archive/data/0", bytes(2**28))
    return sorted(folder.iterdir())


def test_weights_of_every_kind_are_tensors_or_refused(canary: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for file in weight_files(canary, folder):
        assert file.name in refused("search", "--backbone", "resnet18", "--backbone-weights", file)
    for file in (folder / "object.pt", folder / "pickle.safetensors"):
        for flags in (
            ("search", "--grouping", "clip", "--clip.model", "open_clip:RN50/openai", "--clip.weights", file),
            ("search", "--score.detector", "inception", "--detector-weights", file),
            ("search", "--score.detector", "dinov2", "--dinov2-weights", file),
            ("evaluate", "--images", tmp_path, "--detectors", "inception", "--detector-weights", file),
        ):
            assert file.name in refused(*flags)


def test_assignments_are_clusters_or_refused(canary: Path, tmp_path: Path, refused: Refused) -> None:
    count = 1797
    arrays: dict[str, Any] = {
        "object": np.array([Trap(canary)] * count, object), "negative": np.full(count, -1),
        "huge": np.full(count, 2**62), "bool": np.zeros(count, bool), "text": np.array(["a"] * count),
        "nan": np.full(count, np.nan), "shape": np.zeros((count, 2), int),
        "beyond": np.r_[np.zeros(count - 1, int), [count]],
    }  # fmt: skip
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=True)
        assert f"{name}.npy" in refused("search", "--grouping", "file", "--assignments", tmp_path / f"{name}.npy")


def png(side: int = 8, seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def png_of(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG by its chunks, whatever they claim."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *more, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (EVIL_NAME, b"nothing", r"a\x1b[31m\n$(touch trapped);`touch trapped`\u202egnp.png is no readable"),
        (EVIL_NAME, png(4), r"\u202egnp.png is too small"),
        ("a.png", png_of(60_000, 60_000), "bomb"),
        ("a.png", png_of(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26), 9))), "too large"),
        ("a.png", lambda path: path.symlink_to("/etc/passwd"), "leads out of the folder"),
        ("a.png", lambda path: path.symlink_to("/dev/zero"), "leads out of the folder"),
        ("a.png", os.mkfifo, "is not a readable file"),
    ],
    ids=["name", "name of a small one", "header", "text", "link", "endless", "pipe"],
)
def test_a_folder_of_images_is_harmless_or_refused(
    name: str, content: Any, said: str, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "images\x1b[31m\n"
    folder.mkdir()
    (folder / "sound.png").write_bytes(png())
    if callable(content):
        content(folder / name)
    else:
        (folder / name).write_bytes(content)
    flags = ("--dataset", folder, "--resolution", "8", "--backbone", "pixels")
    assert said in refused("search", *flags)
    if not callable(content):
        refused("evaluate", "--images", folder, "--detectors", "lenet")


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


NAMES = [f"{number}.png" for number in range(4)]


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("../e.png", png(), "leads out of the archive"),
        ("/e.png", png(), "leads out of the archive"),
        (link("e.png"), "/etc/passwd", "is a link"),
        ("e.png", bytes(2**26), "as bombs do"),
        (EVIL_NAME, b"x", r"a\x1b[31m\n$(touch trapped)"),
        *(
            ("dataset.json", json.dumps({"labels": [[name, value] for name in NAMES]}), said)
            for value, said in (
                (-1, "must lie in"), (2**62, "must lie in"), (10**30, "whole numbers"), (True, "whole numbers"),
                ("1", "whole numbers"), (1.5, "whole numbers"),
            )
        ),
        ("dataset.json", f'{{"labels": {DEEP}}}', "no readable JSON"),
        ("dataset.json", f'{{"labels": [["0.png", {MANY_DIGITS}]]}}', "no readable JSON"),
    ],
    ids=[
        "parent", "absolute", "link", "bomb", "name", "negative", "large", "huge", "bool", "text", "float", "deep",
        "digits",
    ],
)  # fmt: skip
def test_an_archive_of_images_is_harmless_or_refused(
    member: str | zipfile.ZipInfo, content: str | bytes, said: str, tmp_path: Path, refused: Refused
) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(NAMES):
            archive.writestr(name, png(seed=number))
        archive.writestr(member, content)
    flags = ("--grouping", "labels", "--backbone", "pixels", "--score.detector", "backbone")
    assert said in refused("search", "--dataset", tmp_path / "images.zip", *flags)


@pytest.mark.parametrize("content", [DEEP, f'{{"x": {MANY_DIGITS}}}', "NaN", "\x80\x02", f'{{"trials": {DEEP}}}'])
def test_the_files_of_a_run_are_its_facts_or_refused(content: str, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run\x1b[31m\n"
    (run / "export").mkdir(parents=True)
    for file in ("result.json", "export/model.json"):
        (run / file).write_bytes(content.encode("latin1"))
    assert r"run\x1b[31m\n/result.json is damaged" in refused("report", run)
    assert r"run\x1b[31m\n/export/model.json does not describe" in refused("sample", "--run", run)


def test_a_model_takes_no_more_memory_than_its_weights_say(
    tmp_path: Path, refused: Refused, make_export: Callable[..., Path], canary: Path
) -> None:
    export = make_export("none") / "export"
    facts, weights = json.loads((export / "model.json").read_text()), (export / "model.safetensors").read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    for change in (
        {"img_resolution": -8}, {"label_dim": 10**9}, {"label_dim": 10**30}, {"img_channels": 10**10},
        {"img_resolution": 1e308}, {"num_steps": "x"}, {"diffusion": {**facts["diffusion"], "model_channels": 10**9}},
        {"diffusion": {**facts["diffusion"], "num_blocks": 10**7}},
        {"diffusion": {**facts["diffusion"], "channel_mult": [1] * 100_000}},
    ):  # fmt: skip
        (run / "model.json").write_text(json.dumps({**facts, **change}))
        (run / "model.safetensors").write_bytes(weights)
        refused("sample", "--run", run, "--out", tmp_path / "out.png")
    (run / "model.json").write_text(json.dumps(facts))
    (run / "model.safetensors").write_bytes(pickle.dumps(Trap(canary)))
    assert "cannot be read" in refused("sample", "--run", run, "--out", tmp_path / "out.png")


def test_flags_are_printed_harmlessly(refused: Refused) -> None:
    for program in ("search", "evaluate", "sample", "report", "doctor"):
        assert r"\x1b[31m" in refused(program, "--\x1b[31mevil\n", "1")
