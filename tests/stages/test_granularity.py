import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from optuna import distributions
from scipy.stats import spearmanr

from cedm_ray.config import SearchConfig
from cedm_ray.domains import Choice, Range
from cedm_ray.granularity.rules import FittedChooser
from cedm_ray.granularity.samplers import GpSampler, OptunaSampler
from cedm_ray.granularity.search import GranularitySearch
from cedm_ray.settings import FinalSettings, GranularitySettings, RuleName
from cedm_ray.stages.budget.speeds import KnownSpeed
from cedm_ray.stages.granularity import Watch, _recall, grid, make_search, optuna_distribution, trials_at_once
from cedm_ray.stages.training.records import State, TrialRecord

CONFIG = SearchConfig(
    granularity=GranularitySettings(total_kimg=4, grace_kimg=1, startup_trials=2), final=FinalSettings(total_kimg=5)
)
CANDIDATES = (2, 5, 12, 30, 70)


def account(allowed_kimg: float = 20.0) -> Any:
    return SimpleNamespace(allowed_kimg=lambda: allowed_kimg)


def search_of(config: SearchConfig = CONFIG, allowed_kimg: float = 20.0, **granularity: Any) -> GranularitySearch:
    config = config.model_copy(update={"granularity": replace(config.granularity, **granularity)})
    return make_search(config, CANDIDATES, account(allowed_kimg))


def test_the_grid_is_log_spaced_holds_both_ends_and_no_number_twice() -> None:
    assert grid(range(2, 10), 24) == tuple(range(2, 10)) == grid(range(2, 10), 8)
    points = grid(range(2, 1001), 24)
    assert points[0] == 2 and points[-1] == 1000 and len(set(points)) == len(points) <= 24
    assert list(points) == sorted(points) and all(type(point) is int for point in points)
    ratios = [b / a for a, b in pairwise(points[8:])]  # rounding counts for little from there on
    assert max(ratios) / min(ratios) < 1.04
    assert ratios[-1] == pytest.approx(500 ** (1 / 23), rel=0.02)
    assert grid(range(2, 100), 1) == (99,) and grid(range(2, 3), 24) == (2,)
    assert grid(range(50, 60), 2) == (50, 59)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (Choice(kind="choice", values=(0.0, 0.13)), distributions.CategoricalDistribution([0.0, 0.13])),
        (Choice(kind="choice", values=("a", True)), distributions.CategoricalDistribution(["a", True])),
        (Range(kind="uniform", low=0, high=0.2), distributions.FloatDistribution(0.0, 0.2)),
        (Range(kind="loguniform", low=1e-4, high=1e-2), distributions.FloatDistribution(1e-4, 1e-2, log=True)),
        (Range(kind="randint", low=1, high=6), distributions.IntDistribution(1, 6)),
        (Range(kind="lograndint", low=1, high=64), distributions.IntDistribution(1, 64, log=True)),
    ],
)
def test_a_domain_is_optunas_with_both_ends(domain: Choice | Range, expected: Any) -> None:
    found = optuna_distribution(domain)
    assert found == expected
    ends = domain.values if isinstance(domain, Choice) else domain.ends()
    assert all(found._contains(found.to_internal_repr(end)) for end in ends)
    if isinstance(domain, Range):
        outside = (domain.low - 1, domain.high + 1)
        assert not any(found._contains(value) for value in outside)


@pytest.mark.parametrize(
    ("rule", "first", "verdicts"),
    [("asha", 4, ["continue", "stop"]), ("promotion", 1, ["pause", "pause"]), ("none", 4, ["continue", "continue"])],
)
def test_the_rule_of_the_settings_decides_who_goes_on(rule: RuleName, first: int, verdicts: list[str]) -> None:
    search = search_of(rule=rule, sampler="random")
    said = []
    for score in (3.0, 5.0):
        leg = search.ask()
        assert leg is not None and (leg.start_kimg, leg.stop_kimg) == (0, first)
        said.append(search.tell(leg.key, 1, [score]))
        search.tell(leg.key, 4, [score])
    assert said == verdicts


def test_the_search_is_as_the_settings_say() -> None:
    search = search_of(
        rule="promotion", sampler="tpe", num_trials=3, reduction_factor=3.0, tolerance=0.01, retrain_spread=0.03
    )
    plan = search.plan
    assert (plan.candidates, plan.rungs_kimg) == (CANDIDATES, (1, 3, 4)) and search.allowed_kimg == 20.0
    assert (plan.rule, plan.sampler, plan.startup, plan.num_trials) == ("promotion", "tpe", 2, 3)
    assert (plan.eta, plan.tolerance, plan.retrain_spread, plan.objectives) == (3.0, 0.01, 0.03, 1)
    assert isinstance(search._sampler, OptunaSampler)
    default = search_of()
    assert isinstance(default._chooser, FittedChooser) and isinstance(default._sampler, GpSampler)
    assert (default.plan.rule, default.plan.sampler) == ("fitted", "gp")
    several = CONFIG.with_values({"score.also": ("backbone",), "granularity.multi_objective": True})
    assert search_of(several).plan.objectives == 2
    seeded = search_of(CONFIG.with_values({"seed": 11})).plan
    assert seeded.seed == 11


SPACE = {
    "diffusion.dropout": {"kind": "choice", "values": [0.05, 0.1]},
    "diffusion.lr": {"kind": "loguniform", "low": 1e-4, "high": 2e-3},
    "diffusion.num_blocks": {"kind": "randint", "low": 1, "high": 2},
}


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"diffusion.dropout": 0.1, "diffusion.lr": 1e-3, "diffusion.num_blocks": 2}, (0.1, 1e-3, 2)),
        # What the settings say lies outside: the first of a choice, the nearest end of a range.
        ({"diffusion.dropout": 0.4, "diffusion.lr": 1e-2, "diffusion.num_blocks": 4}, (0.05, 2e-3, 2)),
        ({"diffusion.dropout": 0.05, "diffusion.lr": 1e-6, "diffusion.num_blocks": 1}, (0.05, 1e-4, 1)),
    ],
)
def test_other_settings_start_from_those_given_within_their_domains(
    values: dict[str, Any], first: tuple[float, ...]
) -> None:
    config = CONFIG.with_values({**values, "space": SPACE})
    search = search_of(config, rule=None, sampler=None)
    assert (search.plan.rule, search.plan.sampler) == ("promotion", "tpe")
    params = []
    for score in (3.0, 4.0, 5.0, 6.0):
        leg = search.ask()
        assert leg is not None
        params.append(leg.params)
        search.tell(leg.key, leg.stop_kimg, [score])
    assert [tuple(each[path] for path in SPACE) for each in params[:2]] == [first, first]
    others = [each for each in params[2:] if len(each) == 4]
    assert others and all(each["diffusion.dropout"] in (0.05, 0.1) for each in others)
    assert all(1e-4 <= each["diffusion.lr"] <= 2e-3 and each["diffusion.num_blocks"] in (1, 2) for each in others)


def test_trainings_side_by_side_are_what_the_cluster_holds_or_the_settings_allow() -> None:
    def at_once(holds: int, allowed: int | None) -> int:
        config = CONFIG.with_values({"granularity.max_concurrent": allowed})
        return trials_at_once(cast(Any, SimpleNamespace(config=config, shares=SimpleNamespace(max_trials=holds))))

    assert [at_once(4, None), at_once(4, 2), at_once(1, 8)] == [4, 2, 1]


def record(num_clusters: int, scores: dict[int, float], state: State = "paused", grouping: str = "temi",
           **others: Any) -> TrialRecord:  # fmt: skip
    rungs = tuple({"kimg": k, "score": score, "fid": score, "fdd": 10 * score} for k, score in scores.items())
    params = {"grouping": grouping, "num_clusters": num_clusters, **others}
    return TrialRecord(repr(params), "C", grouping, num_clusters, params, state, rungs=rungs)


def ledger_of(records: Sequence[TrialRecord], config: SearchConfig = CONFIG, legs: dict[int, int] | None = None) -> Any:
    """``legs``: how far the search has asked each C to train."""
    planner = SimpleNamespace(config=config, scoring=SimpleNamespace(metrics=("fid", "fdd")))
    asked = lambda params: (legs or {}).get(params["num_clusters"])  # noqa: E731
    return SimpleNamespace(planner=planner, records=list(records), stop_kimg=asked)


RECORDS = [
    record(5, {1: 3.0, 2: 2.5, 4: 2.0}, "complete"), record(12, {1: 3.1}, "stopped"), record(30, {}, "failed"),
    record(2, {1: 4.0, 2: 3.5}, "running"), record(70, {1: math.nan}, "failed"),
    record(1, {1: 1.0}, grouping="none"), record(5, {1: 1.0}, train_seed=3), record(7, {1: 1.0}, grouping="kmeans"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "twelve", "two"),
    [("promotion", "paused", {1: (4.0,), 2: (3.5,)}), ("asha", "stopped", {1: (4.0,)}), ("none", "paused", None)],
)
def test_a_search_is_told_what_earlier_processes_have_trained_for_it(
    rule: RuleName, twelve: str, two: dict[int, tuple[float, ...]] | None
) -> None:
    search = search_of(rule=rule, sampler="random")
    _recall(search, ledger_of(RECORDS))
    runs = {run.num_clusters: run for run in search.runs}
    assert list(runs) == [5, 12, 30, 2, 70]
    assert {c: run.state for c, run in runs.items()} == {
        5: "complete", 12: twelve, 30: "paused", 2: "paused", 70: "stopped",
    }  # fmt: skip
    assert runs[5].readings == {1: (3.0,), 2: (2.5,), 4: (2.0,)} and runs[70].readings == {} == runs[30].readings
    assert all(run.params == {"num_clusters": c} for c, run in runs.items())
    if two is not None:  # ASHA may not have decided yet on the last rung of a training that was cut off
        assert runs[2].readings == two


def test_what_was_asked_of_a_training_is_recalled_and_what_other_searches_have_trained_of_it_is_left_out() -> None:
    records = [record(5, {1: 3.0, 2: 2.5, 4: 2.0}, "complete"), record(12, {1: 3.1}, "running"), record(30, {1: 4.0})]
    search = search_of()
    _recall(search, ledger_of(records, legs={5: 2, 12: 4}))
    found = {run.num_clusters: (run.state, list(run.readings), run.target_kimg) for run in search.runs}
    assert found == {5: ("paused", [1, 2], 2), 12: ("paused", [1], 4), 30: ("paused", [1], 1)}
    leg = search.ask()
    assert leg is not None and (leg.params, leg.start_kimg, leg.stop_kimg) == ({"num_clusters": 12}, 1, 4)


def test_of_several_objectives_all_scores_are_recalled() -> None:
    config = CONFIG.with_values({"score.also": ("backbone",), "granularity.multi_objective": True})
    search = search_of(config)
    _recall(search, ledger_of([RECORDS[1]], config))
    (run,) = search.runs
    assert run.readings == {1: (3.1, 31.0)}


class Watched:
    """A watch over a search, and what it says."""

    def __init__(self, search: GranularitySearch | None, *, short: bool = False) -> None:
        self.points: list[tuple[str, float, int]] = []
        self.said: list[tuple[str, str]] = []
        self.speeds = [KnownSpeed(1234.5, "measured")]
        tracker = SimpleNamespace(
            parent_key="parent",
            points=lambda run, values, step: self.points.extend((name, value, step) for name, value in values.items()),
        )
        terminal = SimpleNamespace(line=lambda text, style="": self.said.append((text.strip(), style)))
        ctx = SimpleNamespace(terminal=terminal, tracker=tracker)
        hours = SimpleNamespace(wall_hours=lambda beside, alone: beside / 10)
        found = SimpleNamespace(measure=self.measure, allowed_kimg=lambda: 81.6, speed=hours, short=short)
        self.account = found
        self.watch = Watch(cast(Any, ctx), cast(Any, SimpleNamespace(records=[])), search, cast(Any, found))

    def measure(self, records: Any) -> KnownSpeed | None:
        return self.speeds.pop() if self.speeds else None


def with_scores(*scores: dict[int, float]) -> GranularitySearch:
    """A search that knows these learning curves."""
    search = search_of(rule="none", sampler="random", allowed_kimg=40.0)
    for num_clusters, curve in zip(CANDIDATES, scores, strict=False):
        search.recall({"num_clusters": num_clusters}, {kimg: [score] for kimg, score in curve.items()})
    return search


AGREE = [{1: 5.0, 4: 2.0}, {1: 4.0, 4: 1.0}, {1: 6.0, 4: 3.0}, {1: 7.0, 4: 3.5}]
DISAGREE = [{1: 5.0, 2: 4.0, 4: 2.0}, {1: 4.0, 2: 3.0, 4: 3.0}, {1: 6.0, 2: 5.0, 4: 1.0}, {1: 7.0, 2: 6.0, 4: 0.5}]


def test_rank_correlations_are_told_once_for_each_number_of_runs() -> None:
    search = with_scores(*AGREE[:3])
    watched = Watched(search)
    watched.watch.scored()
    assert watched.points == []  # three runs say nothing
    search.recall({"num_clusters": CANDIDATES[3]}, {k: [v] for k, v in AGREE[3].items()})
    for _ in range(3):
        watched.watch.scored()
    assert watched.points == [("rank_correlation_1_4_kimg", pytest.approx(1.0), 4)]
    search.recall({"num_clusters": CANDIDATES[4]}, {1: [3.0], 4: [9.0]})
    for _ in range(3):
        watched.watch.scored()
    expected = spearmanr([5, 4, 6, 7, 3], [2, 1, 3, 3.5, 9]).statistic
    assert watched.points[1:] == [("rank_correlation_1_4_kimg", pytest.approx(expected), 5)]


def test_rungs_that_disagree_are_warned_of_once() -> None:
    watched = Watched(with_scores(*DISAGREE))
    watched.watch.scored()
    watched.watch.scored()
    warnings = [(text, style) for text, style in watched.said if text.startswith("warning")]
    assert len(warnings) == 1 and warnings[0][1] == "yellow"
    text = warnings[0][0]
    assert "the scores of 4 trainings at 1 and at 4 kimg have a rank correlation of -1.00" in text
    assert text.endswith("early scores say little here: raise --granularity.grace-kimg")
    assert not [text for text, _ in agreeing().said if text.startswith("warning")]


def agreeing() -> Watched:
    watched = Watched(with_scores(*AGREE))
    watched.watch.scored()
    return watched


def test_the_first_measured_speed_is_told_once_with_what_it_allows() -> None:
    watched = Watched(with_scores())
    watched.watch.scored()
    watched.watch.scored()
    assert watched.said == [
        ("1,234 images/s in a training, scoring included: the search over C may train 0.0816 Mimg", "")
    ]


def test_a_budget_that_turned_out_too_small_is_told_once() -> None:
    watched = Watched(with_scores(), short=True)
    watched.watch.scored()
    watched.watch.scored()
    assert [text for text, style in watched.said if style] == [
        "warning: the budget does not hold one training beside the rest; one is made all the same"
    ]


def test_where_nothing_is_searched_over_the_speed_alone_is_told() -> None:
    watched = Watched(None, short=True)
    watched.watch.scored()
    assert watched.said == [("1,234 images/s in a training, scoring included", "")]
    assert watched.watch.outlook() == "" and watched.points == []


def test_the_outlook_says_what_is_spent_and_how_long_the_rest_takes_at_most() -> None:
    watched = Watched(with_scores(*AGREE))
    assert watched.watch.outlook() == (
        "C tried: 4, 0.016 Mimg of 0.04 Mimg, at most about 2 h 24 min left"
    )  # 24 kimg at the ten that go through in an hour
    watched.account.speed = None
    assert watched.watch.outlook() == "C tried: 4, 0.016 Mimg of 0.04 Mimg"
