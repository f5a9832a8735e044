import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.granularity.budget import RESERVE
from cedm_ray.settings import BudgetSettings, FinalSettings, GranularitySettings, Grouping, ResourceSettings
from cedm_ray.stages.budget.account import Account
from cedm_ray.stages.budget.plan import Plan
from cedm_ray.stages.budget.speeds import PUBLISHED, KnownSpeed, Speeds
from cedm_ray.stages.budget.spending import Spent, costs, mimg, workload
from cedm_ray.stages.training.records import TrialRecord

CONFIG = SearchConfig(
    granularity=GranularitySettings(total_kimg=100, grace_kimg=50, grid_points=20, share=0.25),
    final=FinalSettings(total_kimg=250, num_sets=3, num_images=5000),
    resources=ResourceSettings(num_workers=2),
)
AROUND_KIMG = 2 * 100 + 150
SPEED = KnownSpeed(500.0, "as given")


def budget(config: SearchConfig = CONFIG, **limits: float) -> SearchConfig:
    return config.model_copy(update={"budget": BudgetSettings(**limits)})


def plan(config: SearchConfig = CONFIG, known: KnownSpeed | None = None, at_once: int | None = None,
         grid_points: int | None = None) -> Plan:  # fmt: skip
    return Plan(config, workload(config, has_labels=True, grid_points=grid_points), known, at_once)


def record(*rungs: dict[str, Any], num_clusters: int = 7) -> TrialRecord:
    params = {"grouping": "temi", "num_clusters": num_clusters}
    return TrialRecord(str(num_clusters), "C", "temi", num_clusters, params, "complete", rungs=rungs)


def account(config: SearchConfig, tmp_path: Path, known: KnownSpeed | None = None, *, at_once: int = 1,
            elapsed_hours: float = 0.0) -> Account:  # fmt: skip
    started_s = time.monotonic() - 3600 * elapsed_hours
    work = workload(config, has_labels=True)
    return Account(config, work, known, at_once, started_s, Speeds(tmp_path, config, 32))


@pytest.mark.parametrize(
    ("grouping", "has_labels", "baselines", "count"),
    [("temi", True, True, 2), ("temi", False, True, 1), ("temi", True, False, 0), ("none", True, True, 2),
     ("labels", True, True, 2), ("clip", False, True, 2), ("clip", True, False, 1)],
)  # fmt: skip
def test_the_trainings_beside_the_search_are_counted(
    grouping: Grouping, has_labels: bool, baselines: bool, count: int
) -> None:
    granularity = replace(CONFIG.granularity, baselines=baselines)
    config = CONFIG.model_copy(update={"grouping": grouping, "granularity": granularity, "confirm": 2})
    work = workload(config, has_labels=has_labels)
    searched = grouping == "temi"
    assert (work.num_baselines, work.grid_points) == (count, 20 if searched else 0)
    assert work.num_confirmed == (6 if searched else 0) and work.final_kimg == 150
    assert workload(config, has_labels=has_labels, grid_points=0).grid_points == 0
    assert workload(config, has_labels=has_labels, grid_points=9).grid_points == (9 if searched else 0)


def test_a_given_speed_comes_before_a_measured_one_and_that_before_a_published_one(tmp_path: Path) -> None:
    speeds = Speeds(tmp_path, CONFIG, 32)
    published = speeds.known(gpus=True)
    # 200 million images in about a day on 4 A100 at 32 pixels a side, in two days at 64.
    assert published is not None and published.images_per_s == pytest.approx(2 * 200e6 / 86_400 / 4)
    assert published.source == "a rough published figure for 2 A100 GPUs"
    assert not list(tmp_path.iterdir())
    speeds.keep_measured(812.5)
    assert Speeds(tmp_path, CONFIG, 32).known(gpus=False) == KnownSpeed(
        812.5, "measured by earlier trainings of these settings"
    )
    given = Speeds(tmp_path, budget(images_per_s=77.0), 32)
    assert given.known(gpus=True) == KnownSpeed(77.0, "as given")


def test_a_speed_is_that_of_the_same_network_images_and_workers(tmp_path: Path) -> None:
    Speeds(tmp_path, CONFIG, 32).keep_measured(812.5)
    others = [
        Speeds(tmp_path, CONFIG, 16),
        Speeds(tmp_path, CONFIG.with_values({"diffusion.dropout": 0.31}), 32),
        Speeds(tmp_path, CONFIG.with_values({"resources.num_workers": 4}), 32),
        Speeds(tmp_path, CONFIG.with_values({"score.num_steps": 9}), 32),
    ]
    assert [speeds.known(gpus=False) for speeds in others] == [None] * 4
    same = Speeds(tmp_path, CONFIG.with_values({"seed": 3, "granularity.total_kimg": 90}), 32).known(gpus=False)
    assert same is not None and same.images_per_s == 812.5


@pytest.mark.parametrize(("side", "gpus", "found"), [(8, True, None), (32, False, None), (32, True, 32), (48, True, 64),
                                                     (64, True, 64), (128, True, None)])  # fmt: skip
def test_a_published_speed_is_for_gpus_and_for_the_sizes_it_is_of(
    side: int, gpus: bool, found: int | None, tmp_path: Path
) -> None:
    known = Speeds(tmp_path, CONFIG, side).known(gpus=gpus)
    assert (None if known is None else known.images_per_s) == (None if found is None else 2 * PUBLISHED[found])


def test_a_torn_file_of_a_speed_counts_as_none(tmp_path: Path) -> None:
    Speeds(tmp_path, CONFIG, 32).keep_measured(812.5)
    (file,) = tmp_path.glob("speeds/*.json")
    file.write_text(file.read_text()[:-3])
    assert Speeds(tmp_path, CONFIG, 32).known(gpus=False) is None


def test_a_training_takes_its_workers_and_the_gpus_of_each() -> None:
    for values, devices in (({}, 2), ({"resources.gpus_per_worker": 2.0}, 4), ({"resources.gpus_per_worker": 0.5}, 1),
                            ({"resources.gpus_per_worker": 0.0}, 2)):  # fmt: skip
        speed = plan(CONFIG.with_values(values), SPEED).speed
        assert speed is not None and speed.device_hours(1800) == pytest.approx(devices)


def test_what_was_spent_is_the_sum_over_all_rungs_and_what_is_not_known_is_left_out() -> None:
    records = [
        record({"kimg": 50, "device_hours": 0.5, "energy_kwh": 0.25}, {"kimg": 100, "device_hours": 0.75}),
        record({"kimg": 50, "device_hours": 0.25, "energy_kwh": None}),
        record(),
    ]
    assert Spent.of(records) == Spent(0.15, 1.5, 0.25)
    assert Spent.of([record({"kimg": 50})]) == Spent(0.05, 0.0, None) and Spent.of([]) == Spent(0.0, 0.0, None)
    work = workload(CONFIG, has_labels=True)
    assert costs(Spent.of(records), work) == {
        "spent_mimg": 0.15, "grid_mimg": (20 * 100 + AROUND_KIMG) / 1000, "device_hours": 1.5, "energy_kwh": 0.25,
    }  # fmt: skip


def test_what_the_search_may_train_under_a_budget_of_images(tmp_path: Path) -> None:
    assert account(CONFIG, tmp_path).allowed_kimg() == 0.25 * 2000
    assert account(budget(mimg=1.0), tmp_path).allowed_kimg() == 1000 - AROUND_KIMG
    assert account(budget(mimg=100.0), tmp_path).allowed_kimg() == 2000
    # Nothing changes with what is measured.
    one = account(budget(mimg=1.0), tmp_path)
    one.measure([record({"kimg": 50, "images_per_s": 3.0, "score_s": 1.0})])
    assert one.allowed_kimg() == 1000 - AROUND_KIMG and not one.short


def test_what_the_search_may_train_under_a_budget_of_device_hours(tmp_path: Path) -> None:
    config = budget(gpu_hours=1.0)
    one = account(config, tmp_path)
    assert one.speed is None and one.allowed_kimg() == 100  # one training, until its speed is known
    heard = one.measure([record({"kimg": 50, "images_per_s": 1000.0, "score_s": 50.0})])
    assert heard == KnownSpeed(500.0, "measured")
    # Two devices at 500 images/s: an hour of both is 900 kimg, less the reserve and what stands around the search.
    assert one.allowed_kimg() == pytest.approx(900 / RESERVE - AROUND_KIMG)
    assert account(config, tmp_path, SPEED).allowed_kimg() == pytest.approx(900 / RESERVE - AROUND_KIMG)


def test_what_the_search_may_train_under_a_budget_of_the_clock(tmp_path: Path) -> None:
    config = budget(wall_hours=0.5)
    one = account(config, tmp_path, at_once=2)
    assert one.allowed_kimg() == 100
    one.measure([record({"kimg": 50, "images_per_s": 500.0, "score_s": 0.0})])
    trained_h = 50 / 2 / 1800
    hours = (0.5 + trained_h) / RESERVE  # no time has passed: the training was an earlier process'
    assert one.allowed_kimg() == pytest.approx(2 * (1800 * hours - 150) - 200, rel=1e-3)
    # Six minutes went by before the first training, and is not there for trainings.
    late = account(config, tmp_path, SPEED, at_once=2, elapsed_hours=0.1)
    assert (
        late.allowed_kimg()
        == pytest.approx(2 * (1800 * 0.4 / RESERVE - 150) - 200, rel=1e-3)
        == pytest.approx(sum_of_plan(late), rel=1e-3)
    )


def sum_of_plan(one: Account) -> float:
    """What the plan's text says of the search, in kimg."""
    (text,) = [text for name, text in one.plan().lines() if name == "search"]
    (said,) = re.findall(r"at most ([\d.,]+) Mimg", text)
    return float(said.replace(",", "")) * 1000


def test_of_several_limits_the_first_that_is_reached_counts(tmp_path: Path) -> None:
    config = budget(mimg=1.0, gpu_hours=0.8)
    one = account(config, tmp_path)
    assert one.allowed_kimg() == 1000 - AROUND_KIMG  # before a speed is known the images alone
    one.measure([record({"kimg": 50, "images_per_s": 500.0, "score_s": 0.0})])
    assert one.allowed_kimg() == pytest.approx(0.8 * 900 / RESERVE - AROUND_KIMG) and one.allowed_kimg() < 500


def test_a_budget_that_turns_out_too_small_still_holds_one_training(tmp_path: Path) -> None:
    one = account(budget(wall_hours=1.0), tmp_path, SPEED, elapsed_hours=3.0)
    assert one.allowed_kimg() == 100 and one.short and sum_of_plan(one) == 100
    assert not account(budget(wall_hours=1.0), tmp_path, SPEED).short
    assert one.retrainings([]) == 0


def test_the_speed_is_that_of_all_rungs_scoring_included_and_kept_for_the_next_search(tmp_path: Path) -> None:
    one = account(CONFIG, tmp_path, SPEED)
    assert one.measure([]) is None and one.measure([record()]) is None and one.speed == plan(known=SPEED).speed
    records = [
        record(
            {"kimg": 50, "images_per_s": 1000.0, "score_s": 10.0},
            {"kimg": 100, "images_per_s": 500.0, "score_s": 30.0},
        ),
        record({"kimg": 50, "images_per_s": 250.0, "score_s": 60.0}),
    ]
    # 150,000 images in 50 + 10 + 100 + 30 + 200 + 60 seconds.
    measured = pytest.approx(150_000 / 450)
    first = one.measure(records)
    assert first is not None and first.images_per_s == measured and one.measure(records) is None
    assert one.speed is not None and one.speed.images_per_s == measured
    (file,) = tmp_path.glob("speeds/*.json")
    assert json.loads(file.read_text()) == {"images_per_s": measured}


def test_retrainings_have_what_the_search_leaves_of_the_budget(tmp_path: Path) -> None:
    assert account(CONFIG, tmp_path).retrainings([]) is None
    config = budget(mimg=1.0)
    trained = [record({"kimg": 100}, num_clusters=c) for c in range(5)]
    assert account(config, tmp_path).retrainings(trained) == (1000 - 500 - 150) // 100
    assert account(config, tmp_path).retrainings([*trained, *trained]) == 0
    # However small the grid is, the budget holds what was given.
    assert account(budget(mimg=9.0), tmp_path).retrainings(trained) == (9000 - 500 - 150) // 100


def test_the_plan_of_a_search_by_share_says_what_is_trained_and_that_the_time_is_unknown() -> None:
    grid = "20 numbers of clusters, log-spaced from 2 to the upper end of C_max's interval"
    assert plan().lines() == [
        ("grid", f"{grid}, 0.1 Mimg each: 2 Mimg"),
        ("search", "at most 0.5 Mimg, 5 whole trainings, 25% of the grid"),
        ("", "sampler gp, rule fitted, scored at 50, 100 kimg"),
        ("beside it", "2 to compare with: 0.2 Mimg"),
        ("final", "the best goes on from 100 to 250 kimg: 0.15 Mimg; scored on 3 x 5,000 images"),
        ("in all", "at most 0.85 Mimg, against 2.35 Mimg with the full grid"),
        ("time", "unknown until the first rung is measured; --budget.images-per-s gives a speed to plan with"),
    ]


def test_the_plan_with_a_known_speed_says_the_hours() -> None:
    config = budget(mimg=1.55, images_per_s=500.0).model_copy(update={"confirm": 1})
    assert dict(plan(config, SPEED).lines()) == {
        **dict(plan().lines()),
        "search": "at most 0.9 Mimg, 9 whole trainings, 45% of the grid",
        "confirm": "each C that ties, about 3, is trained once more: 0.3 Mimg",
        "in all": "at most 1.55 Mimg, against 2.65 Mimg with the full grid",
        # 1.55 million images at 500 a second take 3,100 s.
        "time": "about 1.72 device-hours, 0.861 hours of the clock (one training after another), at 500 images/s "
        "(as given)",
    }
    beside = dict(plan(config, SPEED, at_once=4).lines())["time"]
    # The final training alone runs alone: (1,400 / 4 + 150) kimg are 1,000 s.
    assert "1.72 device-hours, 0.278 hours of the clock (4 at once)" in beside


def test_the_plan_under_hours_of_an_unknown_speed_promises_no_images() -> None:
    lines = dict(plan(budget(gpu_hours=3.0)).lines())
    assert lines["search"] == "as much as the hours allow, once the first rung has shown the speed"
    assert lines["time"].startswith("unknown until") and "in all" not in lines


def test_the_plan_where_nothing_is_searched_over() -> None:
    config = CONFIG.model_copy(update={"grouping": "labels", "confirm": 2})
    assert plan(config).lines() == [
        ("trainings", "one on labels, 1 to compare with: 0.2 Mimg"),
        ("final", "labels goes on from 100 to 250 kimg: 0.15 Mimg; scored on 3 x 5,000 images"),
        ("in all", "at most 0.35 Mimg"),
        ("time", "unknown until the first rung is measured; --budget.images-per-s gives a speed to plan with"),
    ]
    alone = CONFIG.with_values({"granularity.baselines": False})
    assert "beside it" not in dict(plan(alone).lines())


def test_the_plan_knows_the_grid_when_c_max_is_known_and_the_sampler_of_a_space() -> None:
    assert plan(grid_points=12).lines()[0][1].startswith("12 numbers of clusters")
    space = {"diffusion.dropout": {"kind": "choice", "values": [0.0, 0.1]}}
    assert plan(CONFIG.with_values({"space": space})).lines()[2][1].startswith("sampler tpe, rule promotion")


def test_large_figures_have_no_exponents() -> None:
    assert [mimg(kimg) for kimg in (20, 81_649, 123_456_789, 12_345_678)] == [
        "0.02 Mimg", "81.65 Mimg", "123,500 Mimg", "12,350 Mimg",
    ]  # fmt: skip
    large = CONFIG.with_values({"granularity.total_kimg": 10**7, "final.total_kimg": 10**7})
    text = " ".join(text for _, text in plan(large, SPEED).lines())
    assert "e+" not in text and "200,000 Mimg" in text


@pytest.mark.parametrize(
    ("limits", "known", "message"),
    [
        ({"mimg": 0.44}, None, r"^budget.mimg is 0.44; .* 0.45 Mimg: raise it, or lower final.total_kimg"),
        # 450 kimg at 500 images/s take 900 s on 2 devices, and the reserve.
        ({"gpu_hours": 0.5}, SPEED, r"^budget.gpu_hours is 0.5; .* 0.525 hours at 500 images/s: raise it"),
        ({"wall_hours": 0.2}, SPEED, r"^budget.wall_hours is 0.2; .* 0.263 hours at 500 images/s: raise it"),
    ],
)
def test_a_budget_too_small_for_one_training_is_refused_in_one_line(
    limits: dict[str, float], known: KnownSpeed | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        plan(budget(**limits), known).check()
    assert "\n" not in str(refused.value)


def test_a_budget_that_just_holds_one_training_is_taken() -> None:
    plan(budget(mimg=0.45)).check()
    plan(budget(gpu_hours=0.526), SPEED).check()
    plan(budget(wall_hours=0.1)).check()  # of an unknown speed
    plan().check()
    labels = CONFIG.model_copy(update={"grouping": "labels"})
    plan(budget(labels, mimg=0.35)).check()
    with pytest.raises(UserError, match=r"budget.mimg is 0.34; the trainings see 0.35 Mimg"):
        plan(budget(labels, mimg=0.34)).check()
