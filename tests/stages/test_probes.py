from pathlib import Path

import pytest

from cedm_ray.clustering.probes import Probe
from cedm_ray.config import load
from cedm_ray.stages.groupings import clustering_job
from cedm_ray.stages.lower_bound import LowerBound
from cedm_ray.stages.probes import ProbeJobs
from cedm_ray.stages.store import Store
from cedm_ray.stages.upper_bound import UpperBound

EMBEDDINGS = {"images": "abc", "backbone": "pixels"}


def jobs(folder: Path, *flags: str) -> ProbeJobs:
    return ProbeJobs(load(["--bound.low-heads", "2", *flags]), EMBEDDINGS, folder / "images", Store(folder))


def test_the_first_full_probe_of_a_c_is_the_clustering_of_a_trial(tmp_path: Path) -> None:
    made = jobs(tmp_path, "--seed", "3")
    trial = clustering_job(made.config, EMBEDDINGS, tmp_path / "images", 40, Store(tmp_path))
    assert made(Probe(40)) == trial and trial.seed == 3


def test_repeats_have_seeds_of_their_own_and_cheap_probes_fewer_heads(tmp_path: Path) -> None:
    made = jobs(tmp_path, "--seed", "3")
    assert [made(Probe(40, repeat)).seed for repeat in range(3)] == [3, 4, 5]
    low, full = made(Probe(40, 0, "low")), made(Probe(40))
    assert (low.settings.num_heads, full.settings.num_heads) == (2, made.config.temi.num_heads)
    assert len({made(Probe(40, repeat, fidelity)).path for repeat in range(2) for fidelity in ("low", "full")}) == 4
    record = made.record(Probe(40, 1, "low"), 0.9)
    assert (record.seed, record.work) == (4, 2 * made.config.temi.epochs)


@pytest.mark.parametrize(("heads", "cheap"), [("2", True), ("4", False), ("9", False), ("None", False)])
def test_cheap_probes_are_run_where_they_are_cheaper(tmp_path: Path, heads: str, cheap: bool) -> None:
    assert jobs(tmp_path, "--bound.low-heads", heads).has_low is cheap


def test_the_fit_reads_the_mean_over_the_heads_and_the_paper_s_rule_the_chosen_one(tmp_path: Path) -> None:
    facts = {"utilization_ratio": 0.95, "quality": {"mean_utilization_ratio": 0.97}}
    assert jobs(tmp_path).reading(facts) == 0.97
    assert jobs(tmp_path, "--bound.rule", "paper").reading(facts) == 0.95


def test_the_search_reaches_to_the_upper_end_of_the_interval() -> None:
    assert UpperBound(100, (90, 120), 0.95, "found").end == 120
    assert UpperBound(100, None, None, "given").end == 100


def test_the_lower_bound_is_the_mean_and_the_deviation_of_what_is_used() -> None:
    bound = LowerBound(((300, 33), (400, 35), (600, 40)))
    assert (bound.mean, bound.start) == (36.0, 36) and bound.std == pytest.approx(3.6056, abs=1e-4)  # sqrt(26 / 2)
    assert LowerBound(((300, 33),)).std == 0 and LowerBound(((300, 1),)).start == 2
