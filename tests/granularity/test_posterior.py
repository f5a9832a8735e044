import math

import pytest

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.posterior import posterior_of
from cedm_ray.granularity.runs import Run, Runs

RUNGS_KIMG = (1, 2, 4)
CLUSTERS = (2, 3, 5, 8, 13, 22, 36, 60, 100)
MODEL = CurveModel(CLUSTERS, RUNGS_KIMG)


def score(num_clusters: int, kimg: int) -> float:
    """Best at 22."""
    return math.exp(0.2 * math.log(num_clusters / 22) ** 2) * kimg**-0.3


def some_runs() -> tuple[Runs, list[tuple[int, int, float]]]:
    """Runs, and what of them the model may take in: candidate, rung and ln(score)."""
    runs = Runs(RUNGS_KIMG)
    for num_clusters in (3, 22, 77):  # 77 is no candidate
        runs.add(Run({"num_clusters": num_clusters}, "complete", 4, {k: (score(num_clusters, k),) for k in RUNGS_KIMG}))
    # 3 kimg are no rung.
    runs.add(Run({"num_clusters": 60}, "paused", 2, {1: (score(60, 1),), 2: (score(60, 2),), 3: (99.0,)}))
    ends = {3: 3, 22: 3, 60: 2}
    read = [
        (CLUSTERS.index(c), rung, math.log(score(c, kimg)))
        for c, end in ends.items()
        for rung, kimg in enumerate(RUNGS_KIMG[:end])
    ]
    return runs, read


def test_the_posterior_takes_in_what_was_read_of_its_candidates_at_its_rungs() -> None:
    runs, read = some_runs()
    found, wanted = posterior_of(MODEL, runs, (1.0,)), MODEL.fit(*zip(*read, strict=True))
    assert found is not None
    assert found.mean == pytest.approx(wanted.mean) and found.joint == pytest.approx(wanted.joint)
    assert posterior_of(MODEL, Runs(RUNGS_KIMG), (1.0,)) is None


def test_what_running_trainings_are_expected_to_read_counts_as_read() -> None:
    runs, read = some_runs()
    plain = MODEL.fit(*zip(*read, strict=True))
    runs.add(Run({"num_clusters": 8}, "running", 2))
    found, place = posterior_of(MODEL, runs, (1.0,)), (1, CLUSTERS.index(8))
    expected = (place[1], place[0], float(plain.mean[place]))
    wanted = MODEL.fit(*zip(*read, expected, strict=True))
    assert found is not None
    assert found.mean == pytest.approx(wanted.mean) and found.joint == pytest.approx(wanted.joint)
    assert found.variance[place] < 0.6 * plain.variance[place]
