import math
import random
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.rules import FittedChooser, favourite, promotable, stopping_rung_passed
from cedm_ray.granularity.runs import Run, Runs, RunState, name_of

RUNGS_KIMG = (1, 2, 4, 8)
CLUSTERS = (2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_the_stopping_rule_decides_as_ray_s_asha_does(eta: int) -> None:
    stopped = 0
    for seed in range(200):
        rng = random.Random(seed)
        rungs = [eta**k for k in range(4)]
        ray = ASHAScheduler(
            time_attr="kimg", metric="score", mode="min", grace_period=1, max_t=rungs[-1] + 1, reduction_factor=eta
        )
        # Trials of different speeds, so that they do not come to a rung in the order in which they started.
        alive = {n: rungs.copy() for n in range(rng.randint(2, 12))}
        for number in alive:
            ray.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
        before: Mapping[int, list[float]] = {kimg: [] for kimg in rungs}
        ties = eta != 3 and seed % 2  # a third of a hundred is rounded one way here and another way there
        while alive:
            number = rng.choice(list(alive))
            kimg = alive[number].pop(0)
            score = float(rng.randint(1, 5)) if ties else rng.lognormvariate(0, 1)
            said = ray.on_trial_result(None, SimpleNamespace(trial_id=str(number)), {"kimg": kimg, "score": score})
            passed = stopping_rung_passed(before[kimg], score, eta)
            assert passed == (said == TrialScheduler.CONTINUE)
            before[kimg].append(score)
            stopped += not passed
            if not passed or not alive[number]:
                del alive[number]
    assert stopped > 200


def random_runs(rng: random.Random) -> Runs:
    runs = Runs(RUNGS_KIMG)
    for num_clusters in range(2, 2 + rng.randint(0, 14)):
        seen = rng.choice((0, 1, 1, 2, 3, 4))
        read = {kimg: (rng.lognormvariate(0, 1),) for kimg in RUNGS_KIMG[:seen]}
        state: RunState = "complete" if seen == 4 else rng.choice(("paused", "paused", "paused", "running", "failed"))
        if state == "paused" and not seen:
            state = "running"
        further = RUNGS_KIMG[min(seen, 3)]
        target = further if state == "running" else max(read, default=0)
        runs.add(Run({"num_clusters": num_clusters}, state, target, read))
    return runs


def algorithm_2(runs: Runs, eta: float) -> Run | None:
    """get_job of arXiv 1810.05934, word for word: a run was promoted from a rung once it runs or ran beyond it."""
    for k in range(len(RUNGS_KIMG) - 2, -1, -1):
        rung_k = [run for run in runs if RUNGS_KIMG[k] in run.readings]
        candidates = sorted(rung_k, key=lambda run: run.readings[RUNGS_KIMG[k]][0])[: math.floor(len(rung_k) / eta)]
        not_promoted = [run for run in candidates if not any(kimg > RUNGS_KIMG[k] for kimg in run.readings)]
        ready = [run for run in not_promoted if run.state == "paused"]
        if ready:
            return ready[0]
    return None


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_promotion_is_algorithm_2(eta: int) -> None:
    rng, found = random.Random(eta), 0
    for _ in range(400):
        runs = random_runs(rng)
        wanted = algorithm_2(runs, eta)
        assert promotable(runs, eta) is wanted
        found += wanted is not None
    assert 60 < found < 390


def test_nobody_is_promoted_from_the_end_or_while_too_few_are_at_a_rung() -> None:
    runs = Runs((1, 2))
    runs.add(Run({"num_clusters": 2}, "complete", 2, {1: (1.0,), 2: (1.0,)}))
    assert promotable(runs, 2) is None
    runs.add(Run({"num_clusters": 3}, "paused", 1, {1: (2.0,)}))
    assert promotable(runs, 2) is None  # the best half is the complete one
    runs.add(Run({"num_clusters": 4}, "paused", 1, {1: (0.5,)}))
    best = promotable(runs, 2)
    assert best is not None and best.num_clusters == 4


def test_several_scores_are_promoted_by_their_geometric_mean() -> None:
    runs = Runs((1, 2))
    for num_clusters, scores in ((2, (1.0, 9.0)), (3, (2.0, 4.0))):
        runs.add(Run({"num_clusters": num_clusters}, "paused", 1, {1: scores}))
    best = promotable(runs, 2)
    assert best is not None and best.num_clusters == 3


def test_the_favourite_is_the_best_of_those_that_have_come_farthest() -> None:
    rng = random.Random(0)
    for _ in range(100):
        runs = random_runs(rng)
        among = [run for run in runs if run.readings]
        found = favourite(list(runs))
        if not among:
            assert found is None
            continue
        farthest = max(max(run.readings) for run in among)
        assert found is not None
        assert found.readings[farthest] == min(run.readings[farthest] for run in among if farthest in run.readings)


def choose(
    runs: Runs,
    left_kimg: float = 100,
    tolerance: float = 0.0,
    *,
    may_start: bool = True,
    clusters: tuple[int, ...] = CLUSTERS,
) -> tuple[int, int, int] | None:
    """Number of clusters, kimg from and to."""
    chooser = FittedChooser(CurveModel(clusters, RUNGS_KIMG), tolerance)
    found = chooser.choose(runs, (1.0,), left_kimg, may_start=may_start)
    if found is None:
        return None
    what, kimg = found
    return (what.num_clusters, what.reached_kimg, kimg) if isinstance(what, Run) else (what, 0, kimg)


def bowl(*reached_kimg: int, states: Mapping[int, RunState] | None = None) -> Runs:
    """Runs of the first so many numbers of clusters that have come so far; the best C is 16."""
    runs = Runs(RUNGS_KIMG)
    for num_clusters, reached in zip(CLUSTERS, reached_kimg, strict=False):
        if reached:
            read = {
                k: (math.exp(0.1 * math.log(num_clusters / 16) ** 2) * k**-0.3,) for k in RUNGS_KIMG if k <= reached
            }
            state: RunState = (states or {}).get(num_clusters, "complete" if reached == 8 else "paused")
            runs.add(Run({"num_clusters": num_clusters}, state, reached, read))
    return runs


def test_before_the_first_reading_and_without_a_living_run_there_is_nothing_to_weigh() -> None:
    assert choose(Runs(RUNGS_KIMG)) is None
    assert choose(bowl(1, 1, states={2: "failed", 4: "failed"})) is None


def test_it_trains_where_the_curves_are_low_and_not_where_they_are_high() -> None:
    found = choose(bowl(1, 0, 1, 0, 1, 1))
    assert found is not None and found[0] in (8, 16, 32)


@pytest.mark.parametrize("left_kimg", [0, 1, 2, 3, 5, 7, 8, 9, 12, 20])
def test_what_finishes_the_best_looking_run_is_kept_back(left_kimg: float) -> None:
    for seed in range(15):
        runs, rng = Runs(RUNGS_KIMG), random.Random(seed)
        for num_clusters in rng.sample(CLUSTERS, 4):
            seen = rng.randint(1, 4)
            read = {k: (rng.lognormvariate(0, 0.1) * k**-0.3,) for k in RUNGS_KIMG[:seen]}
            runs.add(Run({"num_clusters": num_clusters}, "complete" if seen == 4 else "paused", max(read), read))
        found = choose(runs, left_kimg)
        if found is None:
            continue
        num_clusters, start, stop = found
        assert stop - start <= left_kimg and start < stop
        places = [(i, r, math.log(run.readings[k][0])) for run in runs for i in [CLUSTERS.index(run.num_clusters)]
                  for r, k in enumerate(RUNGS_KIMG) if k in run.readings]  # fmt: skip
        final = CurveModel(CLUSTERS, RUNGS_KIMG).fit(*zip(*places, strict=True)).final
        top = min(runs, key=lambda run: final[CLUSTERS.index(run.num_clusters)])
        keep = 0 if top.num_clusters == num_clusters else 8 - top.reached_kimg
        assert stop - start + keep <= left_kimg


def test_what_is_kept_back_to_finish_a_run_may_go_into_a_longer_leg_of_that_run() -> None:
    # Nothing is left but what finishes C = 16: its leg to the end is affordable, though it costs all of it.
    assert choose(bowl(8, 8, 8, 1, 8, 8), left_kimg=7) == (16, 1, 8)
    assert choose(bowl(0, 0, 0, 2, 0, 0), left_kimg=6) == (16, 2, 8)


def test_the_end_comes_when_nothing_is_worth_its_images_and_the_best_looking_run_is_finished() -> None:
    never = 10.0
    assert choose(bowl(8, 1, 8, 8, 8, 8), tolerance=never) is None
    for reached, wanted in ((1, (16, 1, 2)), (2, (16, 2, 4)), (4, (16, 4, 8))):
        assert choose(bowl(1, 1, 1, reached, 1, 1), tolerance=never) == wanted
    assert choose(bowl(1, 1, 1, 2, 1, 1), tolerance=never, left_kimg=5) is None  # it cannot be finished
    assert choose(bowl(1, 1, 1, 8, 1, 1), tolerance=never) is None


def test_where_every_gain_is_next_to_nothing_rounding_does_not_decide() -> None:
    runs = Runs(RUNGS_KIMG)
    for num_clusters in (2, 64):
        runs.add(Run({"num_clusters": num_clusters}, "paused", 1, {1: (2.0 if num_clusters == 2 else 40.0,)}))
    assert choose(runs, tolerance=0.0005, clusters=(2, 64)) == (2, 1, 2)


def test_nobody_new_starts_when_that_is_not_allowed_and_running_runs_are_left_alone() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        runs = bowl(*(rng.choice((1, 2)) for _ in range(4)))
        found = choose(runs, may_start=False)
        assert found is not None and found[0] in CLUSTERS[:4] and found[1]
    runs = bowl(1, 1, 1, 1, 1, 1, states=dict.fromkeys(CLUSTERS, "running"))
    for run in runs:
        run.target_kimg = 2
    assert choose(runs) is None


def test_two_places_are_not_given_to_the_same_question() -> None:
    runs = bowl(1, 0, 1, 0, 1, 1)
    first = choose(runs)
    assert first is not None and first[1] == 0
    runs.add(Run({"num_clusters": first[0]}, "running", first[2]))
    second = choose(runs)
    assert second is not None and second[0] != first[0]


def test_what_a_running_run_is_still_to_see_is_not_kept_back_twice() -> None:
    runs = bowl(1, 1, 1, 1, 1, 1, states={16: "running"})
    runs[name_of({"num_clusters": 16})].target_kimg = 4
    assert choose(runs, left_kimg=5) is not None  # 4 of them to finish it, from where it is going to pause
    assert choose(runs, left_kimg=4) is None


def test_a_stopped_run_that_looks_best_does_not_hold_the_budget_back() -> None:
    runs = bowl(1, 1, 4, 4, 4, 1, states={16: "stopped"})
    found = choose(runs, left_kimg=4, tolerance=10.0)
    assert found is not None and found[0] in (8, 32) and found[2] == 8


def test_several_weights_look_for_different_ends_of_the_front() -> None:
    runs = Runs(RUNGS_KIMG)
    for num_clusters in (2, 8, 64):
        low, high = math.exp(0.1 * math.log(num_clusters / 2)), math.exp(0.1 * math.log(64 / num_clusters))
        runs.add(Run({"num_clusters": num_clusters}, "paused", 1, {1: (low, high)}))
    chooser = FittedChooser(CurveModel(CLUSTERS, RUNGS_KIMG), 10.0)
    for weights, wanted in (((1.0, 0.01), 2), ((0.01, 1.0), 64)):
        found = chooser.choose(runs, weights, 100)
        assert found is not None and isinstance(found[0], Run) and found[0].num_clusters == wanted
