import random
from dataclasses import replace

import pytest

from cedm_ray.errors import UserError
from cedm_ray.granularity.budget import RESERVE, Limits, Speed, Workload, check_budget, search_kimg

# 24 C of 100 Mimg each; two baselines, three retrainings, and 100 Mimg more for the best one.
WORK = Workload(24, 100_000, 2, 3, 100_000, 0.25)


def test_the_full_grid_and_what_stands_around_it_are_sums() -> None:
    assert (WORK.grid_kimg, WORK.around_kimg, WORK.full_grid_kimg) == (2_400_000, 600_000, 3_000_000)


def test_hours_follow_from_images_a_second() -> None:
    speed = Speed(images_per_s=500, devices=4, at_once=2)
    assert speed.device_hours(1800) == pytest.approx(4)  # 1.8 million images in an hour, on four devices
    assert speed.wall_hours(1800, 0) == pytest.approx(0.5)
    assert speed.wall_hours(0, 1800) == pytest.approx(1)
    assert speed.wall_hours(3600, 900) == pytest.approx(1.5)


def test_without_limits_the_search_gets_its_share_but_at_least_one_training() -> None:
    assert not Limits().given
    assert search_kimg(WORK, Limits(), None) == 600_000
    assert search_kimg(WORK, Limits(), Speed(1, 1), passed_hours=1e9) == 600_000
    assert search_kimg(replace(WORK, grid_points=3), Limits(), None) == 100_000


def test_a_limit_of_images_is_what_is_left_after_all_else_and_at_most_the_grid() -> None:
    assert search_kimg(WORK, Limits(mimg=1100), None) == 500_000
    assert search_kimg(WORK, Limits(mimg=1e6), None) == WORK.grid_kimg
    assert search_kimg(WORK, Limits(mimg=500), None) == -100_000
    assert search_kimg(WORK, Limits(mimg=3000), None) == WORK.grid_kimg  # not more than the full grid costs


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_what_is_allowed_takes_just_the_hours_that_are_given(at_once: int) -> None:
    speed = Speed(400.0, 8, at_once)
    for allowed in (100_000, 731_000):
        used = allowed + WORK.around_kimg
        devices = Limits(device_hours=RESERVE * speed.device_hours(used))
        assert search_kimg(WORK, devices, speed) == pytest.approx(allowed)
        wall = Limits(wall_hours=RESERVE * speed.wall_hours(used - WORK.final_kimg, WORK.final_kimg))
        assert search_kimg(WORK, wall, speed) == pytest.approx(allowed)
        later = Limits(wall_hours=wall.wall_hours + 7)  # type: ignore[operator]
        assert search_kimg(WORK, later, speed, passed_hours=7) == pytest.approx(allowed)


def test_of_several_limits_the_tightest_decides_and_hours_wait_for_a_speed() -> None:
    speed = Speed(400.0, 8)
    limits = Limits(mimg=1200, device_hours=RESERVE * speed.device_hours(900_000), wall_hours=1e9)
    assert search_kimg(WORK, limits, None) == 600_000
    assert search_kimg(WORK, limits, speed) == pytest.approx(300_000)


def test_a_budget_that_holds_one_training_passes_and_a_smaller_one_is_refused_with_what_it_takes() -> None:
    check_budget(WORK, Limits(), None)
    check_budget(WORK, Limits(mimg=700), None)
    check_budget(WORK, Limits(device_hours=1e-6), None)  # nothing is known of the speed
    with pytest.raises(UserError) as caught:
        check_budget(WORK, Limits(mimg=699.5), None)
    assert str(caught.value) == (
        "budget.mimg is 699.5; one training and what stands around it see 700 Mimg: raise it, "
        "or lower final.total_kimg or granularity.total_kimg, or give --granularity.no-baselines"
    )


def test_the_limit_that_is_missed_by_most_is_named() -> None:
    speed = Speed(500.0, 4, 2)  # 700 Mimg take 389 hours one after another, on four devices
    with pytest.raises(UserError, match=r"budget\.gpu_hours is 100; .* take about 1640 hours at 500 images/s: raise"):
        check_budget(WORK, Limits(device_hours=100, mimg=690), speed)
    with pytest.raises(UserError, match=r"budget\.wall_hours is 200; .* take about 234 hours at 500 images/s: raise"):
        check_budget(WORK, Limits(device_hours=2000, wall_hours=200), speed)
    with pytest.raises(UserError, match=r"budget\.mimg is 10; .* see 700 Mimg: raise"):
        check_budget(WORK, Limits(device_hours=1600, wall_hours=200, mimg=10), speed)


def test_what_a_message_asks_for_is_enough_and_the_bound_itself_never_breaks_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        speed = Speed(rng.uniform(1, 5000), rng.randint(1, 16), rng.randint(1, 6))
        for limit in ("device_hours", "wall_hours"):
            with pytest.raises(UserError) as caught:
                check_budget(WORK, Limits(**{limit: 1e-3}), speed)
            asked = float(str(caught.value).split("take about ")[1].split(" hours")[0])
            check_budget(WORK, Limits(**{limit: asked}), speed)
            with pytest.raises(UserError):
                check_budget(WORK, Limits(**{limit: 0.98 * asked}), speed)
        least = WORK.total_kimg + WORK.around_kimg
        try:  # rounding may decide either way
            check_budget(WORK, Limits(device_hours=RESERVE * speed.device_hours(least)), speed)
        except UserError as error:
            assert "budget.gpu_hours" in str(error)


def test_where_no_c_is_searched_over_only_the_given_trainings_have_to_fit() -> None:
    work = Workload(0, 100_000, 3, 0, 100_000, 0.25)
    check_budget(work, Limits(mimg=400), None)
    with pytest.raises(UserError, match=r"budget\.mimg is 399; the trainings see 400 Mimg"):
        check_budget(work, Limits(mimg=399), None)
