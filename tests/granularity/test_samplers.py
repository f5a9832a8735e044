import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import optuna
import pytest

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.runs import Run, Runs, RunState, mean_log_score
from cedm_ray.granularity.samplers import (
    OptunaSampler,
    Sampler,
    SamplerName,
    farthest,
    log_spaced,
    make_sampler,
    nearest,
)

RUNGS_KIMG = (1, 2, 4)
CLUSTERS = (2, 3, 5, 8, 13, 22, 36, 60, 100)
NAMES: tuple[SamplerName, ...] = ("gp", "tpe", "random")
SPACE = {
    "diffusion.dropout": optuna.distributions.FloatDistribution(0.0, 0.3),
    "diffusion.augment": optuna.distributions.CategoricalDistribution([True, False]),
}


def score(num_clusters: int, kimg: int = 4) -> float:
    """Best at 22."""
    return math.exp(0.2 * math.log(num_clusters / 22) ** 2) * kimg**-0.3


def runs_of(*clusters: int, reached_kimg: int = 4, state: RunState | None = None, **others: Any) -> Runs:
    runs = Runs(RUNGS_KIMG)
    for num_clusters in clusters:
        read = {k: (score(num_clusters, k),) for k in RUNGS_KIMG if k <= reached_kimg}
        usual: RunState = "complete" if reached_kimg == 4 else "paused"
        runs.add(Run({"num_clusters": num_clusters, **others}, state or usual, reached_kimg, read))
    return runs


def sampler(name: SamplerName, candidates: Sequence[int] = CLUSTERS, seed: int = 0) -> Sampler:
    return make_sampler(name, CurveModel(candidates, RUNGS_KIMG), seed)


def test_the_nearest_point_is_nearest_on_a_log_scale() -> None:
    assert [nearest(CLUSTERS, c) for c in (1, 2.4, 2.5, 4, 6.5, 1000)] == [2, 2, 3, 5, 8, 100]
    rng = np.random.default_rng(0)
    for c in np.exp(rng.uniform(0, 6, 200)):
        assert nearest(CLUSTERS, c) == CLUSTERS[int(np.abs(np.log(CLUSTERS) - np.log(c)).argmin())]


def test_a_design_is_evenly_spaced_on_a_log_scale_and_holds_both_ends() -> None:
    assert log_spaced(CLUSTERS, 2) == [2, 100] and log_spaced(CLUSTERS, 3) == [2, 13, 100]
    assert log_spaced(CLUSTERS, 1) == [13]  # the middle is at 14.1
    assert log_spaced(CLUSTERS, 50) == list(CLUSTERS) and log_spaced([7], 4) == [7]
    for count in range(2, 12):
        found = log_spaced(range(2, 300), count)
        assert len(found) == len(set(found)) == count and found[0] == 2 and found[-1] == 299
        assert np.allclose(found, np.geomspace(2, 299, count), rtol=0.25)


def test_the_farthest_untried_point_has_the_widest_gap_around_it() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        tried = rng.sample([*CLUSTERS, 4, 500], rng.randint(1, 6))
        left = [c for c in CLUSTERS if c not in tried]
        found = farthest(runs_of(*tried), CLUSTERS)
        assert found in left
        gaps = {c: min(abs(math.log(c) - math.log(t)) for t in tried) for c in left}
        assert gaps[found] == pytest.approx(max(gaps.values()))
    assert farthest(runs_of(*CLUSTERS), CLUSTERS) is None
    assert farthest(runs_of(), CLUSTERS) in CLUSTERS


@pytest.mark.parametrize("name", NAMES)
def test_no_proposal_is_known_until_all_are_tried_and_then_there_is_none(name: SamplerName) -> None:
    propose = sampler(name)
    runs, found = runs_of(22), [22]
    while (params := propose.propose(runs, CLUSTERS, (1.0,))) is not None:
        assert not runs.holds(params) and set(params) == {"num_clusters"}
        found.append(params["num_clusters"])
        runs.add(next(iter(runs_of(found[-1]))))
    assert sorted(found) == list(CLUSTERS)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_runs_give_the_same_proposal_and_others_or_another_seed_others(name: SamplerName) -> None:
    wide = tuple(range(2, 30))
    seen = set()
    for tried in ((2, 29), (2, 10, 29)):
        for seed in (0, 1):
            proposals = [sampler(name, wide, seed).propose(runs_of(*tried), wide, (1.0,)) for _ in range(2)]
            asked_before = sampler(name, wide, seed)
            asked_before.propose(runs_of(7, 70), wide, (1.0,))
            proposals.append(asked_before.propose(runs_of(*tried), wide, (1.0,)))
            assert proposals[0] == proposals[1] == proposals[2] is not None
            seen.add(proposals[0]["num_clusters"])
    assert len(seen) > 1


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_proposals_turn_to_where_scores_are_good(name: SamplerName) -> None:
    wide = (2, 3, 4, 5, 6, 7, 9, 12, 15, 18, 22, 25, 30, 40, 50, 70, 90, 120, 160, 220, 300, 399)
    near = 0
    for seed in range(12):
        runs = runs_of(2, 6, 18, 25, 70, 399)
        params = sampler(name, wide, seed).propose(runs, wide, (1.0,))
        assert params is not None
        near += 8 <= params["num_clusters"] <= 65  # two fifths of the range on a log scale
    assert near >= 8


def test_before_the_first_reading_the_process_proposes_what_lies_farthest() -> None:
    runs = runs_of(2, reached_kimg=0, state="running")
    assert sampler("gp").propose(runs, CLUSTERS, (1.0,)) == {"num_clusters": 100}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_optuna_hears_of_whole_trainings_as_complete_and_of_all_others_as_pruned_with_their_steps(
    kind: Literal["tpe", "random"],
) -> None:
    runs = runs_of(2, 5)
    states: tuple[RunState, ...] = ("paused", "stopped", "running", "failed")
    for num_clusters, state in zip((8, 13, 36, 60), states, strict=True):
        runs.add(next(iter(runs_of(num_clusters, reached_kimg=2, state=state))))
    runs.add(Run({"num_clusters": 100}, "running", 1))
    trials = {t.params["num_clusters"]: t for t in OptunaSampler(kind, 0).study(runs, CLUSTERS, (1.0,)).trials}
    assert sorted(trials) == [2, 5, 8, 13, 36, 60]
    for num_clusters, trial in trials.items():
        complete = num_clusters in (2, 5)
        assert trial.state.name == ("COMPLETE" if complete else "PRUNED")
        wanted = {k: pytest.approx(math.log(score(num_clusters, k))) for k in (RUNGS_KIMG if complete else (1, 2))}
        assert trial.intermediate_values == wanted
        assert (trial.value == trial.intermediate_values[4]) if complete else trial.last_step == 2
    study = OptunaSampler(kind, 0).study(runs, CLUSTERS, (1.0,))
    assert study.direction.name == "MINIMIZE" and study.best_trial.params == {"num_clusters": 5}


def test_an_early_score_is_never_taken_for_a_final_one() -> None:
    runs = runs_of(22)
    runs.add(Run({"num_clusters": 2}, "paused", 1, {1: (1e-6,)}))  # looks best by far, at its first rung
    study = OptunaSampler("tpe", 0).study(runs, CLUSTERS, (1.0,))
    assert study.best_trial.params == {"num_clusters": 22}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_other_parameters_are_drawn_from_their_own_space(kind: Literal["tpe", "random"]) -> None:
    runs = Runs(RUNGS_KIMG)
    runs.add(next(iter(runs_of(8, **{"diffusion.dropout": 0.1, "diffusion.augment": True}))))
    propose, found = OptunaSampler(kind, 3, SPACE), []
    for _ in range(25):
        params = propose.propose(runs, CLUSTERS, (1.0,))
        assert params is not None and not runs.holds(params)
        assert set(params) == {"num_clusters", *SPACE} and params["num_clusters"] in CLUSTERS
        assert 0 <= params["diffusion.dropout"] <= 0.3 and params["diffusion.augment"] in (True, False)
        found.append(params)
        runs.add(Run(params, "complete", 4, {4: (score(params["num_clusters"]) + params["diffusion.dropout"],)}))
    assert len({params["diffusion.dropout"] for params in found}) > 10
    assert {params["diffusion.augment"] for params in found} == {True, False}
    assert len(propose.study(runs, CLUSTERS, (1.0,)).trials) == len(runs)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_small_space_is_used_up_without_a_repeat(kind: Literal["tpe", "random"]) -> None:
    propose = OptunaSampler(kind, 0, {"diffusion.augment": SPACE["diffusion.augment"]})
    runs = Runs(RUNGS_KIMG)
    while (params := propose.propose(runs, (2, 5), (1.0,))) is not None:
        assert not runs.holds(params)
        runs.add(Run(params, "complete", 4, {4: (score(params["num_clusters"]),)}))
    assert len(runs) == 4


@pytest.mark.parametrize("dropout", [0.5, None])
def test_runs_outside_of_the_space_are_not_told_to_optuna(dropout: float | None) -> None:
    others = {"diffusion.augment": True} | ({} if dropout is None else {"diffusion.dropout": dropout})
    runs, propose = runs_of(8, **others), OptunaSampler("tpe", 0, SPACE)
    assert propose.study(runs, CLUSTERS, (1.0,)).trials == []
    assert propose.propose(runs, CLUSTERS, (1.0,)) is not None
    outside = runs_of(2, 8, 1000)
    assert len(OptunaSampler("tpe", 0).study(outside, CLUSTERS, (1.0,)).trials) == 2


def test_optuna_takes_several_scores_by_their_weights() -> None:
    runs = Runs(RUNGS_KIMG)
    for num_clusters, scores in ((2, (1.0, 9.0)), (8, (5.0, 2.0))):
        runs.add(Run({"num_clusters": num_clusters}, "complete", 4, {4: scores}))
    for weights, wanted in (((1.0, 0.0), 2), ((0.0, 1.0), 8)):
        study = OptunaSampler("tpe", 0).study(runs, CLUSTERS, weights)
        assert study.best_trial.params["num_clusters"] == wanted
        assert study.best_value == pytest.approx(mean_log_score(runs_scores(runs, wanted), weights))


def runs_scores(runs: Runs, num_clusters: int) -> tuple[float, ...]:
    return next(run.readings[4] for run in runs if run.num_clusters == num_clusters)


def test_a_single_candidate_can_be_sampled() -> None:
    for name in NAMES:
        assert sampler(name, (6,)).propose(Runs(RUNGS_KIMG), (6,), (1.0,)) == {"num_clusters": 6}
        assert sampler(name, (6,)).propose(runs_of(6), (6,), (1.0,)) is None


def test_the_process_searches_over_c_alone() -> None:
    with pytest.raises(ValueError, match=r"sampler gp searches over C alone, and the space holds diffusion\.dropout"):
        make_sampler("gp", CurveModel(CLUSTERS, RUNGS_KIMG), 0, {"diffusion.dropout": SPACE["diffusion.dropout"]})
