import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.clustering.quality import kl_from_uniform
from cedm_ray.data.pack import load_packed
from cedm_ray.diffusion.sampler import generate
from cedm_ray.features.pixels import pixel_stats
from cedm_ray.metrics.stats import load_stats
from cedm_ray.sample import main
from cedm_ray.stages.results.exported import open_confidence, open_exported
from cedm_ray.stages.results.model_card import model_card

CPU = torch.device("cpu")
BASIC = {"model.safetensors", "model.json", "reference.safetensors", "reference-fd_pixels.safetensors", "samples.png",
         "README.md"}  # fmt: skip


@pytest.fixture(scope="module")
def run(make_export: Callable[..., Path]) -> Path:
    return make_export()


@pytest.fixture(scope="module")
def card(run: Path) -> str:
    return (run / "export" / "README.md").read_text()


def block(card: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)
    return str(found)


def test_the_export_holds_the_averaged_weights_the_clustering_its_head_and_the_statistics(run: Path) -> None:
    export = run / "export"
    assert {file.name for file in export.iterdir()} == BASIC | {
        "clustering.safetensors", "head.safetensors", "pixels.safetensors"
    }  # fmt: skip
    state, weights = load_file(run / "checkpoint" / "state.safetensors"), load_file(export / "model.safetensors")
    assert len(weights) > 50 and all(torch.equal(state[f"ema.{name}"], value) for name, value in weights.items())
    assert any(not torch.equal(state[f"net.{name}"], value) for name, value in weights.items())
    for name, detector in (("reference", "lenet"), ("reference-fd_pixels", "pixels")):
        assert load_stats(export / f"{name}.safetensors").facts.detector == detector
    stats, kept = pixel_stats(load_packed(run / "images").images), load_file(export / "pixels.safetensors")
    assert np.array_equal(kept["mean"].numpy(), stats.mean) and np.array_equal(kept["std"].numpy(), stats.std)


def test_model_json_says_what_the_model_is(run: Path) -> None:
    facts = json.loads((run / "export" / "model.json").read_text())
    packed, probs = (
        load_packed(run / "images"),
        load_clustering(run / "export" / "clustering.safetensors").cluster_probs,
    )
    assert {name: facts[name] for name in ("label_dim", "num_clusters", "num_images", "nimg", "grouping", "seed")} == {
        "label_dim": 40, "num_clusters": 40, "num_images": 300, "nimg": 3000, "grouping": "temi", "seed": 0
    }  # fmt: skip
    assert facts["images_sha256"] == packed.facts.pixels_sha256
    assert facts["num_used"] == int((probs > 0).sum()) and facts["kl_from_uniform"] == kl_from_uniform(probs)
    assert facts["embedding"] == {"backbone": "pixels", "weights": "pixels", "dtype": "float32"}
    weights = load_file(run / "export" / "model.safetensors")
    assert facts["num_parameters"] == sum(value.numel() for value in weights.values())
    assert facts["versions"]["torch"] == torch.__version__ and facts["score"]["kimg"] == 3


def test_the_exported_head_gives_the_training_images_their_clusters(run: Path) -> None:
    model = open_exported(run, device=CPU)
    confidence = open_confidence(model, None, device=CPU)
    images = torch.from_numpy(np.array(load_packed(run / "images").images))
    clustering = load_clustering(run / "export" / "clustering.safetensors")
    np.testing.assert_array_equal(confidence(images), clustering.max_prob)
    assert len(np.unique(clustering.assignments)) > 10 and clustering.max_prob.std() > 0.01


def test_the_card_states_the_facts(run: Path, card: str) -> None:
    facts = json.loads((run / "export" / "model.json").read_text())
    for said in (
        "# digits in 40 visual groups", "C_V = 40", f"`{facts['images_sha256']}`", "300 of 8 x 8 pixels, grey",
        f"{facts['num_used']} of 40; q(c) is", "`pixels` in float32", "3 kimg in batches of 1024", "label dropout 0",
        "| fd_lenet | 1.5 | 0.25 | 3 | 500 | 300 | lenet |", "| fd_pixels | 1.5 | 0.25 | 3 | 500 | 300 | pixels |",
        f"| lenet | `{'ab' * 32}` | none | float32 |", "Heun, 4 steps (7 network evaluations)", "drawn from q(c)",
        f"torch {torch.__version__}", "trained on the images of digits",
    ):  # fmt: skip
        assert said in card, said
    listed = set(re.findall(r"^\| `([\w.-]+)` \|", card, re.MULTILINE))
    assert listed == {file.name for file in (run / "export").iterdir()} - {"README.md"}
    assert "None" not in card and "nan" not in card and max(map(len, block(card, "python").splitlines())) < 120


@pytest.mark.parametrize(
    ("grouping", "conditions"), [("temi", "cluster_probs"), ("labels", "uniform"), ("none", "cluster_probs")]
)
def test_the_cards_program_works_and_gives_the_images_of_the_scores(
    make_export: Callable[..., Path], grouping: str, conditions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export(grouping, conditions=conditions) / "export"
    monkeypatch.chdir(export)
    program, names = block((export / "README.md").read_text(), "python"), {}  # type: ignore[var-annotated]
    assert len(program.split("\n\n")[1].splitlines()) == 4
    exec(program, names)
    model = open_exported(export, device=CPU)
    expected = next(generate(model.net, seed=0, indices=range(16), cluster_probs=model.cluster_probs, batch_size=16,
                             num_steps=4, device=CPU))  # fmt: skip
    assert torch.equal(names["images"], expected) and expected.shape == (16, 1, 8, 8) and expected.float().std() > 10
    assert (model.cluster_probs is None) == (grouping == "none")
    if conditions == "uniform":
        assert model.cluster_probs is not None and set(model.cluster_probs.tolist()) == {1.0}


def test_the_cards_command_works(run: Path, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = block(card, "sh").split()
    assert words[:3] == ["python", "-m", "cedm_ray.sample"]
    monkeypatch.chdir(run / "export")
    assert main([*words[3:], "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").size == (2 + 8 * 50, 2 + 8 * 50)


def test_the_card_names_the_tie_set_where_the_search_has_one(run: Path, card: str) -> None:
    facts = json.loads((run / "export" / "model.json").read_text())
    told = model_card({**facts, "tie_set": {"clusters": [30, 40], "margin": 0.02, "best": 40}}, set())
    assert "| tie set | C = 30, 40: scores within 2.0% of the lowest" in told and "tie set" not in card


def test_what_a_grouping_does_not_have_is_not_exported_or_told(make_export: Callable[..., Path]) -> None:
    labels, none = make_export("labels") / "export", make_export("none") / "export"
    assert {file.name for file in labels.iterdir()} == BASIC | {"clustering.safetensors"}
    assert {file.name for file in none.iterdir()} == BASIC
    for export, title in ((labels, "# digits in 10 groups\n"), (none, "# digits, unconditional\n")):
        card = (export / "README.md").read_text()
        assert card.startswith(title) and "C_V" not in card and "embeddings" not in card and "was chosen" not in card
    assert json.loads((none / "model.json").read_text())["label_dim"] == 0


def test_others_may_read_the_weights_as_far_as_the_umask_lets_them(run: Path) -> None:
    masked = os.umask(0)
    os.umask(masked)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (run / "export").iterdir()}
    assert len(modes) > 5 and set(modes.values()) == {0o666 & ~masked}, modes
