import math

import numpy as np
import pytest

from cedm_ray.report.efficiency import kimg_to_reach, sample_efficiency
from cedm_ray.report.rows import Curve


def power_law(scale: float, slope: float, kimg: tuple[float, ...], label: str = "own") -> Curve:
    """Scores scale * kimg ** -slope: straight lines in logarithms, for which interpolation is exact."""
    return Curve(label, None, tuple((x, scale * x**-slope) for x in kimg))


@pytest.mark.parametrize("slope", [0.1, 0.5, 1.7])
@pytest.mark.parametrize("times", [1.3, 4.0, 11.0])
def test_between_power_laws_the_factor_is_the_ratio_of_their_scales(slope: float, times: float) -> None:
    own = power_law(100.0, slope, (10, 37, 200, 900, 4000))
    other = power_law(100.0 * times**slope, slope, (10, 300, 1500), "other")
    found = sample_efficiency(own, other)
    assert found is not None and found.factor == pytest.approx(times)
    assert (found.other_kimg, found.at_least) == (1500, False)
    assert found.own_kimg == pytest.approx(1500 / times)


def test_interpolation_agrees_with_numpy_in_logarithms() -> None:
    kimg, scores = np.array([12.0, 25.0, 50.0, 100.0]), np.array([9.0, 5.5, 4.1, 3.7])
    for target in np.linspace(3.7, 9.0, 17):
        due = math.exp(np.interp(-math.log(target), -np.log(scores), np.log(kimg)))
        points = list(zip(kimg.tolist(), scores.tolist(), strict=True))
        assert kimg_to_reach(points, float(target)) == pytest.approx(due)


def test_the_first_crossing_counts_where_scores_rise_again() -> None:
    assert kimg_to_reach([(10, 8.0), (20, 2.0), (30, 6.0), (40, 1.0)], 2.0) == pytest.approx(20)
    assert kimg_to_reach([(10, 8.0), (20, 2.0), (30, 6.0), (40, 1.0)], 4.0) == pytest.approx(10 * 2**0.5)


def test_the_best_score_of_the_other_counts_and_the_earlier_of_equals() -> None:
    other = Curve("other", None, ((10, 5.0), (20, 3.0), (30, 3.0), (40, 4.0)))
    found = sample_efficiency(Curve("own", 5, ((5, 6.0), (10, 3.0))), other)
    assert found is not None and (found.target, found.other_kimg) == (3.0, 20)
    assert found.factor == pytest.approx(2.0)


def test_at_its_first_report_as_good_the_factor_is_a_bound() -> None:
    found = sample_efficiency(Curve("own", 5, ((10, 2.0), (20, 1.0))), Curve("other", None, ((40, 2.0),)))
    assert found is not None and found.at_least and found.factor == 4.0 and str(found) == "≥ 4"
    assert found.sentence() == "is as good as other at its best (2) with at least 4 times fewer images"


def test_never_as_good_there_is_no_factor() -> None:
    found = sample_efficiency(Curve("own", 5, ((10, 2.0),)), Curve("other", None, ((40, 1.0),)))
    assert found is not None and found.factor is None and str(found) == "n.a."
    assert found.sentence() == "is never as good as other at its best (1)"


def test_more_images_than_the_other_is_a_factor_below_one() -> None:
    own = Curve("own", 5, ((10, 8.0), (40, 2.0)))
    found = sample_efficiency(own, Curve("other", None, ((10, 4.0),)))
    assert found is not None and found.factor == pytest.approx(0.5)
    assert found.sentence() == "is as good as other at its best (4) with 2 times as many images"
    late = sample_efficiency(Curve("own", 5, ((30, 3.0),)), Curve("other", None, ((10, 4.0),)))
    assert late is not None and late.sentence().endswith("with at most 3 times as many images")


def test_a_score_without_a_logarithm_counts_at_its_report() -> None:
    assert kimg_to_reach([(10, 1.0), (20, 0.0)], 0.5) == 20
    assert kimg_to_reach([(10, 1.0), (20, -0.1)], 0.0) == 20


def test_without_scores_there_is_nothing_to_compare() -> None:
    some, none = Curve("a", 5, ((1, 1.0),)), Curve("b", None, ())
    assert sample_efficiency(some, none) is None
    assert sample_efficiency(none, some) is None
