from dataclasses import asdict, replace

import pytest

from cedm_ray.errors import UserError
from cedm_ray.metrics.scores import Score, require_same_terms, series_name

SCORE = Score(
    metric="fid",
    value=2.5,
    std=None,
    detector="inception",
    weights_hash="abc",
    resize="bilinear to 299 px",
    dtype="float32",
    num_images=50_000,
    num_reference=60_000,
)


@pytest.mark.parametrize(
    ("term", "value", "difference"),
    [
        ("metric", "fdd", "metric is fid on one side and fdd on the other"),
        ("detector", "dinov2", "detector is inception on one side and dinov2 on the other"),
        ("weights_hash", "def", "weights_hash is abc on one side and def on the other"),
        ("resize", "none", "resize is bilinear to 299 px on one side and none on the other"),
        ("dtype", "float16", "dtype is float32 on one side and float16 on the other"),
        ("num_images", 10_000, "num_images is 50000 on one side and 10000 on the other"),
        ("num_reference", 10_000, "num_reference is 60000 on one side and 10000 on the other"),
    ],
)
def test_each_term_that_differs_forbids_a_comparison(term: str, value: object, difference: str) -> None:
    other = replace(SCORE, **{term: value})
    assert SCORE.same_terms(other) == difference
    assert other.same_terms(SCORE) is not None
    with pytest.raises(UserError) as caught:
        require_same_terms([SCORE, SCORE, other])
    assert str(caught.value) == f"these scores cannot be compared: {difference}; compute both on the same terms"


@pytest.mark.parametrize(("fact", "value"), [("value", 9.0), ("std", 0.1), ("num_sets", 3)])
def test_what_the_result_is_and_how_often_it_was_drawn_is_no_term(fact: str, value: float) -> None:
    other = replace(SCORE, **{fact: value})
    assert SCORE.same_terms(other) is None
    require_same_terms([SCORE, other])


def test_every_fact_is_either_compared_or_named_as_a_result() -> None:
    results = {"value", "std", "num_sets"}
    others = {name: "another" for name in asdict(SCORE) if name not in results}
    for name, another in others.items():
        assert SCORE.same_terms(replace(SCORE, **{name: another})) is not None, name


@pytest.mark.parametrize("scores", [[], [SCORE]])
def test_fewer_than_two_scores_have_nothing_to_differ_in(scores: list[Score]) -> None:
    require_same_terms(scores)


@pytest.mark.parametrize(
    ("num_images", "name"),
    [
        (50_000, "fid_50k"),
        (1800, "fid_1800"),
        (1000, "fid_1k"),
        (999, "fid_999"),
        (1_000_000, "fid_1000k"),
        (1, "fid_1"),
    ],
)
def test_the_count_is_in_the_name_of_a_series(num_images: int, name: str) -> None:
    assert series_name("fid", num_images) == name


def test_a_series_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="num_images is 0; it must be at least 1"):
        series_name("fid", 0)
