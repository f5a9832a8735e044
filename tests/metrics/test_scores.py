import pytest

from cedm_ray.metrics.scores import series_name


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
