import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cedm_ray.granularity.runs import Run, Runs, RunState, mean_log_score, name_of

RUNGS_KIMG = (10, 20, 40)


def run(num_clusters: int, state: RunState, target_kimg: int, *read_kimg: int) -> Run:
    return Run({"num_clusters": num_clusters}, state, target_kimg, {kimg: (1.0,) for kimg in read_kimg})


@pytest.mark.parametrize("rungs", [(), (0, 10), (-1, 10), (10, 10), (20, 10)])
def test_rungs_that_do_not_ascend_from_above_0_are_refused(rungs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend from above 0"):
        Runs(rungs)


def test_a_name_tells_parameters_apart_whatever_their_order() -> None:
    a = {"num_clusters": 3, "diffusion.dropout": 0.1}
    assert name_of(a) == name_of(dict(reversed(a.items())))
    others: list[dict[str, Any]] = [{**a, "num_clusters": 4}, {**a, "diffusion.dropout": 0.2}, {"num_clusters": 3}]
    assert len({name_of(a), *map(name_of, others)}) == 4


def test_runs_are_found_by_key_and_by_parameters_in_the_order_in_which_they_started() -> None:
    runs = Runs(RUNGS_KIMG)
    keys = [runs.add(run(c, "paused", 10, 10)) for c in (30, 4, 9)]
    assert [each.num_clusters for each in runs] == [30, 4, 9] and len(runs) == 3
    assert [runs[key].num_clusters for key in keys] == [30, 4, 9]
    assert runs.holds({"num_clusters": 9})
    assert not runs.holds({"num_clusters": 5}) and not runs.holds({"num_clusters": 9, "x": 1})
    runs.add(run(4, "complete", 40, 10, 20, 40))
    assert [each.num_clusters for each in runs.in_state("paused")] == [30, 9]
    assert [each.num_clusters for each in runs.in_state("complete", "paused")] == [30, 4, 9]


def test_a_run_that_trains_is_charged_up_to_its_target_and_any_other_for_what_it_has_seen() -> None:
    rng = random.Random(0)
    for _ in range(50):
        runs, wanted = Runs(RUNGS_KIMG), 0
        for num_clusters in range(2, 2 + rng.randint(0, 8)):
            reached = rng.choice((0, *RUNGS_KIMG))
            state = rng.choice(("running", "paused", "stopped", "complete", "failed"))
            target = rng.choice([kimg for kimg in RUNGS_KIMG if kimg >= reached])
            runs.add(run(num_clusters, state, target, *(kimg for kimg in RUNGS_KIMG if kimg <= reached)))
            wanted += target if state == "running" else reached
        assert runs.spent_kimg == wanted


def test_the_next_rung_is_the_first_one_above_what_was_reached() -> None:
    runs = Runs(RUNGS_KIMG)
    assert runs.total_kimg == 40 and runs.next_rung(None) == 10
    assert [runs.next_rung(run(2, "paused", 40, *read)) for read in ((), (10,), (10, 20))] == [10, 20, 40]


def test_several_scores_become_the_logarithm_of_their_geometric_mean() -> None:
    scores = np.random.default_rng(0).uniform(0.1, 50, 5)
    assert mean_log_score(scores) == pytest.approx(math.log(stats.gmean(scores)))
    weights = [1.0, 2.0, 0.0, 4.0, 0.5]
    assert mean_log_score(scores, weights) == pytest.approx(math.log(stats.gmean(scores, weights=weights)))
    assert mean_log_score([3.0]) == mean_log_score([3.0], [0.2]) == pytest.approx(math.log(3))
    for rounded in (0.0, -1e-9):  # a distance that rounding made so
        assert mean_log_score([rounded]) == pytest.approx(math.log(1e-12))
    with pytest.raises(ValueError):
        mean_log_score([1.0, 2.0], [1.0])
