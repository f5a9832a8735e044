import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import optuna
import pytest

from cedm_ray.granularity.rules import RuleName, stopping_rung_passed
from cedm_ray.granularity.runs import Leg, Params, Run, name_of
from cedm_ray.granularity.samplers import SamplerName
from cedm_ray.granularity.search import GranularitySearch, SearchPlan

RULES: tuple[RuleName, ...] = ("fitted", "promotion", "asha", "none")
SAMPLERS: tuple[SamplerName, ...] = ("gp", "tpe", "random")
PLAN = SearchPlan(candidates=(2, 4, 8, 16, 32, 64), rungs_kimg=(1, 2, 4, 8), startup=3)
Score = Callable[[Params, int], tuple[float, ...]]
SPACE = {"diffusion.dropout": (optuna.distributions.FloatDistribution(0.0, 0.3), 0.1)}


def bowl(params: Params, kimg: int) -> tuple[float, ...]:
    """Best at 16."""
    return (math.exp(0.1 * math.log(params["num_clusters"] / 16) ** 2) * kimg**-0.3,)


class Trainings:
    """Runs the legs of a search side by side, each rung taking a turn of chance, and checks what is promised.

    Args:
        failing: How likely a run is to fail before a rung.
    """

    def __init__(
        self, search: GranularitySearch, score: Score = bowl, at_once: int = 1, failing: float = 0.0, seed: int = 0
    ) -> None:
        self.search, self.score, self.at_once, self.failing = search, score, at_once, failing
        self.rng = random.Random(seed)
        self.running: dict[str, tuple[Leg, Iterator[int]]] = {}
        self.legs: list[tuple[Params, int, int]] = []
        self.seen: dict[str, int] = {}
        self.most_allowed = search.allowed_kimg

    def run(self, most_legs: int = 10_000) -> "Trainings":
        """To the end of the search, or until so many legs have run and no other runs."""
        for _ in range(10_000):
            while len(self.running) < self.at_once and len(self.legs) < most_legs:
                leg = self.search.ask()
                if leg is None:
                    break
                self._start(leg)
            if not self.running:
                assert self.search.done or len(self.legs) >= most_legs
                return self
            assert not self.search.done
            self._step(self.rng.choice(list(self.running)))
        raise AssertionError("the search does not end")

    def _start(self, leg: Leg) -> None:
        assert leg.key == name_of(leg.params) and leg.key not in self.running
        assert leg.start_kimg == self.seen.get(leg.key, 0) < leg.stop_kimg
        assert leg.start_kimg in (0, *self.search.plan.rungs_kimg) and leg.stop_kimg in self.search.plan.rungs_kimg
        self.legs.append((leg.params, leg.start_kimg, leg.stop_kimg))
        rungs = [kimg for kimg in self.search.plan.rungs_kimg if leg.start_kimg < kimg <= leg.stop_kimg]
        self.running[leg.key] = leg, iter(rungs)
        assert self.search.runs.spent_kimg <= self.search.allowed_kimg + 1e-9
        promised = sum(self.seen.values()) + sum(
            each.stop_kimg - self.seen.get(key, 0) for key, (each, _) in self.running.items()
        )
        assert self.search.runs.spent_kimg == promised

    def _step(self, key: str) -> None:
        leg, rungs = self.running[key]
        if self.rng.random() < self.failing:
            del self.running[key]
            self.search.end(key, failed=True)
            return
        kimg = next(rungs)
        self.seen[key] = kimg
        verdict = self.search.tell(key, kimg, self.score(leg.params, kimg))
        if verdict == "continue" and kimg < self.search.plan.rungs_kimg[-1]:
            assert kimg < leg.stop_kimg
            return
        del self.running[key]
        if verdict != "pause":
            self.search.end(key, failed=False)

    @property
    def complete(self) -> list[int]:
        return sorted(run.num_clusters for run in self.search.runs.in_state("complete"))

    @property
    def best(self) -> int:
        total = self.search.plan.rungs_kimg[-1]
        complete = self.search.runs.in_state("complete")
        return min(complete, key=lambda run: run.readings[total]).num_clusters


def plans() -> list[Any]:
    return [(rule, sampler) for rule in RULES for sampler in SAMPLERS if rule != "fitted" or sampler == "gp"]


@pytest.mark.parametrize("candidates", [(), (4, 2), (2, 2, 4), (0, 3)])
def test_candidates_must_ascend_from_1(candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend from at least 1"):
        replace(PLAN, candidates=candidates)


def test_a_space_beside_c_is_not_for_the_fitted_rule_nor_for_the_process() -> None:
    with pytest.raises(ValueError, match=r"fitted rule searches over C alone, and the space holds diffusion\.dropout"):
        GranularitySearch(PLAN, 100, SPACE)
    with pytest.raises(ValueError, match="sampler gp searches over C alone"):
        GranularitySearch(replace(PLAN, rule="promotion"), 100, SPACE)


@pytest.mark.parametrize("rule,sampler", plans())
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_the_budget_is_never_exceeded_and_the_search_ends_with_a_whole_training(
    rule: RuleName, sampler: SamplerName, at_once: int
) -> None:
    assert set(RULES) == set(get_args(RuleName)) and set(SAMPLERS) == set(get_args(SamplerName))
    for seed in range(6):
        rng = random.Random(f"{rule} {sampler} {at_once} {seed}")
        noise = np.random.default_rng(seed).normal(0, 0.1, (100, 10))
        best, failing = rng.uniform(1, 5), rng.choice((0.0, 0.0, 0.2))
        plan = SearchPlan(
            candidates=tuple(sorted(rng.sample(range(1, 100), rng.randint(1, 8)))),
            rungs_kimg=tuple(sorted(rng.sample(range(1, 30), rng.randint(1, 4)))),
            rule=rule,
            sampler=sampler,
            startup=rng.randint(1, 5),
            num_trials=rng.choice((None, None, 1, 3)),
            eta=rng.choice((2.0, 3.0, 4.0)),
            seed=seed,
        )

        def score(
            params: Params, kimg: int, plan: SearchPlan = plan, best: float = best, noise: Any = noise
        ) -> tuple[float, ...]:
            c, rung = params["num_clusters"], plan.rungs_kimg.index(kimg)
            return (math.exp(0.1 * (math.log(c) - best) ** 2 + float(noise[c % 100, rung])) / (rung + 1),)

        total = plan.rungs_kimg[-1]
        allowed = rng.choice((0.5, 1.0, 1.3, 2.0, 3.0, 20.0)) * total
        done = Trainings(GranularitySearch(plan, allowed), score, at_once, failing, seed).run()
        assert sum(done.seen.values()) <= allowed
        if failing == 0 and allowed >= total:
            assert done.complete
        if allowed < total:
            assert not done.legs
        if plan.num_trials is not None:
            assert len(done.search.runs) <= plan.num_trials
        assert all(params["num_clusters"] in plan.candidates for params, _, _ in done.legs)


@pytest.mark.parametrize("rule,sampler", plans())
def test_a_search_that_was_killed_goes_on_as_it_would_have_without(rule: RuleName, sampler: SamplerName) -> None:
    plan = replace(PLAN, rule=rule, sampler=sampler)
    whole = Trainings(GranularitySearch(plan, 30)).run()
    assert len(whole.legs) >= 3
    killed = Trainings(GranularitySearch(plan, 30))
    for legs in range(len(whole.legs) + 1):
        killed.run(legs)
        again = GranularitySearch(plan, 30)
        for run in killed.search.runs:
            again.recall(run.params, run.readings, stopped=run.state == "stopped")
        after = Trainings(again)
        after.seen = dict(killed.seen)
        after.run()
        assert killed.legs + after.legs == whole.legs
        assert (after.complete, after.best) == (whole.complete, whole.best)


def train(search: GranularitySearch, score: Score) -> Iterator[tuple[int, int]]:
    """One leg after another, to the end; each C and kimg, just before the search hears of its score."""
    while (leg := search.ask()) is not None:
        for kimg in (k for k in search.plan.rungs_kimg if leg.start_kimg < k <= leg.stop_kimg):
            yield leg.params["num_clusters"], kimg
            if search.tell(leg.key, kimg, score(leg.params, kimg)) == "stop":
                search.end(leg.key, failed=False)
                break


def other_courses(rule: RuleName, seeds: range, *, remembers: bool) -> tuple[int, int]:
    """Searches killed before every one of their rungs: how many, and how many of them then took another course."""
    kills = others = 0
    for seed in seeds:
        noise = np.random.default_rng(seed).normal(0, 0.05, (65, 9))

        def score(params: Params, kimg: int, noise: Any = noise) -> tuple[float, ...]:
            return (bowl(params, kimg)[0] * math.exp(noise[params["num_clusters"], kimg]),)

        plan = replace(PLAN, rule=rule, sampler="gp", seed=seed, retrain_spread=0.05)
        search = GranularitySearch(plan, 36)
        whole, after = [], []
        for rung in train(search, score):
            whole.append(rung)
            again = GranularitySearch(plan, 36)
            for run in search.runs:
                stop_kimg = run.target_kimg if remembers else None
                again.recall(run.params, run.readings, stop_kimg=stop_kimg, stopped=run.state == "stopped")
            after.append(list(train(again, score)))
        kills += len(whole)
        others += sum(rest != whole[count:] for count, rest in enumerate(after))
    return kills, others


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 10), marks=pytest.mark.slow)])
def test_a_search_that_was_killed_in_the_middle_of_a_leg_goes_on_as_it_would_have_without(
    rule: RuleName, seeds: range
) -> None:
    kills, others = other_courses(rule, seeds, remembers=True)
    print(f"{rule}: of {kills} killed searches {others} took another course")
    assert kills > 10 * len(seeds) and others == 0


def test_a_search_that_forgot_where_its_leg_was_to_end_may_take_another_course() -> None:
    kills, others = other_courses("fitted", range(1), remembers=False)
    assert 0 < others < kills / 4


def test_what_was_set_aside_for_a_cut_off_leg_is_there_for_it_and_no_more() -> None:
    for allowed, wanted in ((9, (1, 4)), (3, None)):
        search = GranularitySearch(PLAN, allowed)
        search.recall({"num_clusters": 64}, {1: (3.0,)}, stop_kimg=4)
        leg = search.ask()
        assert (leg and (leg.start_kimg, leg.stop_kimg)) == wanted
        assert search.runs.spent_kimg == (4 if leg else 1) and not (leg and search.done)


@pytest.mark.parametrize("rule,sampler", plans())
def test_a_training_that_was_cut_off_on_its_way_is_taken_up_again(rule: RuleName, sampler: SamplerName) -> None:
    search = GranularitySearch(replace(PLAN, rule=rule, sampler=sampler), 30)
    search.recall({"num_clusters": 64}, {})
    search.recall({"num_clusters": 2}, {1: bowl({"num_clusters": 2}, 1)})
    first = search.ask()
    assert first is not None and first.params == {"num_clusters": 64} and first.start_kimg == 0
    if rule in ("asha", "none"):
        second = search.ask()
        assert second is not None and (second.params, second.start_kimg, second.stop_kimg) == (
            {"num_clusters": 2},
            1,
            8,
        )


def test_what_an_earlier_process_trained_is_charged_and_other_rungs_are_left_out() -> None:
    search = GranularitySearch(PLAN, 30)
    search.recall({"num_clusters": 64}, {4: (1.0,), 1: (3.0,), 3: (0.1,), 2: (2.0,)})
    search.recall({"num_clusters": 2}, {k: (1.0,) for k in PLAN.rungs_kimg})
    search.recall({"num_clusters": 8}, {1: (9.0,)}, stopped=True)
    found = {run.num_clusters: (run.state, run.reached_kimg, list(run.readings)) for run in search.runs}
    assert found == {64: ("paused", 4, [1, 2, 4]), 2: ("complete", 8, [1, 2, 4, 8]), 8: ("stopped", 1, [1])}
    assert search.runs.spent_kimg == 13 and search.left_kimg == 17


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_budget_that_is_cut_in_the_middle_lets_running_legs_end_and_starts_no_other(
    rule: RuleName, at_once: int
) -> None:
    for legs in range(1, 6):
        search = GranularitySearch(replace(PLAN, rule=rule), 40)
        part = Trainings(search, at_once=at_once)
        while len(part.legs) < legs and (leg := search.ask()) is not None:
            part._start(leg)
            if len(part.running) == at_once:
                part._step(part.rng.choice(list(part.running)))
        search.allowed_kimg = 0
        before = len(part.legs)
        part.run()
        assert search.done and len(part.legs) == before


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_that_grows_before_the_end_is_used(rule: RuleName) -> None:
    small = Trainings(GranularitySearch(replace(PLAN, rule=rule), 8)).run()
    search = GranularitySearch(replace(PLAN, rule=rule), 8)
    grown = Trainings(search).run(1)
    search.allowed_kimg = 30
    grown.run()
    assert sum(grown.seen.values()) > sum(small.seen.values()) == 8
    assert small.complete


@pytest.mark.parametrize("rule,sampler", plans())
def test_the_best_c_of_a_plain_bowl_is_found(rule: RuleName, sampler: SamplerName) -> None:
    done = Trainings(GranularitySearch(replace(PLAN, rule=rule, sampler=sampler), 48)).run()
    assert done.best == 16
    if rule in ("fitted", "promotion"):
        assert done.legs[:3] == [({"num_clusters": c}, 0, 1) for c in (2, 16, 64)] or done.legs[:3] == [
            ({"num_clusters": c}, 0, 1) for c in (2, 8, 64)
        ]


def test_the_fitted_rule_spends_less_than_the_full_grid_and_ends_by_itself() -> None:
    done = Trainings(GranularitySearch(PLAN, 1000)).run()
    assert done.best == 16 and sum(done.seen.values()) < 0.8 * 6 * 8


def test_the_stopping_variant_stops_as_its_rule_says_and_nobody_stops_without_a_rule() -> None:
    search = GranularitySearch(replace(PLAN, rule="asha", sampler="random"), 1000)
    done = Trainings(search).run()
    readings: dict[int, list[float]] = {kimg: [] for kimg in PLAN.rungs_kimg}
    for run in search.runs:  # one after another
        for kimg in PLAN.rungs_kimg[:-1]:
            if kimg not in run.readings:
                break
            own = math.log(run.readings[kimg][0])
            passed = stopping_rung_passed(readings[kimg], own, PLAN.eta)
            readings[kimg].append(own)
            assert passed == (run.reached_kimg > kimg)
        assert run.state == ("complete" if run.reached_kimg == 8 else "stopped")
    assert 0 < len(done.complete) < 6
    everybody = Trainings(GranularitySearch(replace(PLAN, rule="none"), 1000)).run()
    assert everybody.complete == list(PLAN.candidates)


def test_promotion_pauses_at_every_rung_and_goes_on_one_rung_at_a_time() -> None:
    done = Trainings(GranularitySearch(replace(PLAN, rule="promotion"), 20)).run()
    rungs = [0, *PLAN.rungs_kimg]
    assert all(stop == rungs[rungs.index(start) + 1] for _, start, stop in done.legs if stop < 8)
    finished = [params["num_clusters"] for params, start, stop in done.legs if stop == 8]
    assert finished and done.complete == sorted(finished)


@pytest.mark.parametrize("rule", ["fitted", "promotion"])
def test_fewer_trainings_than_the_design_has_still_follow_the_rule(rule: RuleName) -> None:
    plan = replace(PLAN, rule=rule, startup=6, num_trials=2)
    done = Trainings(GranularitySearch(plan, 1000)).run()
    assert len(done.search.runs) == 2
    assert any(start and stop < 8 for _, start, stop in done.legs)  # from rung to rung, and not all to the end at once


@pytest.mark.parametrize("rule", RULES)
def test_one_candidate_and_one_rung_are_a_search(rule: RuleName) -> None:
    for candidates, rungs in (((5,), (8,)), ((5,), (1, 2, 8)), ((3, 9), (8,))):
        plan = SearchPlan(candidates, rungs, rule=rule, sampler="random")
        done = Trainings(GranularitySearch(plan, 16), lambda params, kimg: (float(params["num_clusters"]),)).run()
        assert done.best == candidates[0]
        assert not Trainings(GranularitySearch(plan, 7.9)).run().legs


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("rule", ["promotion", "asha", "none"])
def test_other_parameters_are_searched_over_too(rule: RuleName, sampler: SamplerName) -> None:
    def score(params: Params, kimg: int) -> tuple[float, ...]:
        return (bowl(params, kimg)[0] * (1 + params["diffusion.dropout"]),)

    search = GranularitySearch(replace(PLAN, rule=rule, sampler=sampler, num_trials=12), 60, SPACE)
    done = Trainings(search, score, at_once=2).run()
    design = [params for params, start, _ in done.legs if start == 0][:3]
    assert [params["diffusion.dropout"] for params in design] == [0.1] * 3
    assert len({params["diffusion.dropout"] for params, _, _ in done.legs}) >= 3
    assert done.complete and sum(done.seen.values()) <= 60


def test_a_default_outside_of_its_own_space_does_not_end_the_search() -> None:
    space = {"diffusion.dropout": (SPACE["diffusion.dropout"][0], 0.9)}
    done = Trainings(GranularitySearch(replace(PLAN, rule="promotion", sampler="tpe"), 40, space)).run()
    assert {params["diffusion.dropout"] for params, _, _ in done.legs} - {0.9}


def front(params: Params, kimg: int) -> tuple[float, ...]:
    """One detector likes 4 best, the other one 32."""
    return tuple(math.exp(0.1 * math.log(params["num_clusters"] / best) ** 2) * kimg**-0.3 for best in (4, 32))


@pytest.mark.parametrize("rule,sampler", plans())
def test_a_search_of_two_scores_ends_with_a_whole_training(rule: RuleName, sampler: SamplerName) -> None:
    plan = replace(PLAN, rule=rule, sampler=sampler, objectives=2)
    assert Trainings(GranularitySearch(plan, 32), front, at_once=2).run().complete


def test_both_ends_of_a_front_are_trained() -> None:
    done = Trainings(GranularitySearch(replace(PLAN, objectives=2, tolerance=0.0), 44), front).run()
    reached = {run.num_clusters: run.reached_kimg for run in done.search.runs}
    assert min(reached[4], reached[32]) > min(reached.values())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_weights_spread_evenly_over_all_mixtures(count: int) -> None:
    search = GranularitySearch(replace(PLAN, objectives=count), 1e9)
    search.runs.add(run := Run({"num_clusters": 2}, "paused", 0))
    drawn = []
    for kimg in range(1, 1001):
        run.readings[kimg] = (1.0,) * count
        drawn.append(search._weights())
    weights = np.array(drawn)
    assert np.all(weights >= 0) and weights.sum(1) == pytest.approx(1)
    # Uniform over the simplex: every weight has the mean 1/k, and exceeds w with the chance (1 - w)^(k - 1).
    assert weights.mean(0) == pytest.approx(1 / count, abs=0.01)
    for level in (0.1, 0.3, 0.5, 0.8):
        assert (weights > level).mean(0) == pytest.approx((1 - level) ** (count - 1), abs=0.02)
    assert GranularitySearch(PLAN, 1)._weights() == (1.0,)


@pytest.mark.parametrize("rule", RULES)
def test_failed_runs_cost_what_they_had_shown_and_are_not_tried_again(rule: RuleName) -> None:
    search = GranularitySearch(replace(PLAN, rule=rule, sampler="random"), 1000)
    done = Trainings(search, failing=0.5, seed=3).run()
    failed = search.runs.in_state("failed")
    assert failed and search.runs.spent_kimg == sum(run.reached_kimg for run in search.runs)
    starts = [params["num_clusters"] for params, start, _ in done.legs if start == 0]
    assert len(starts) == len(set(starts))


def test_asking_telling_and_ending_follow_the_legs() -> None:
    search = GranularitySearch(replace(PLAN, rule="promotion"), 40)
    legs = [search.ask() for _ in range(3)]
    keys = [leg.key for leg in legs if leg is not None]
    assert len(set(keys)) == 3 and search.runs.spent_kimg == 3 and not search.done
    assert search.tell(keys[0], 1, (1.0,)) == "pause"
    assert search.tell(keys[1], 1, (2.0,)) == "pause"
    promoted = search.ask()
    assert promoted is not None and (promoted.key, promoted.start_kimg, promoted.stop_kimg) == (keys[0], 1, 2)
    search.end(keys[1], failed=True)  # it failed while it was paused
    search.end(keys[2], failed=False)  # it ended by itself before its first rung
    assert [search.runs[key].state for key in keys] == ["running", "failed", "stopped"]
    for kimg, verdict in ((2, "pause"), (4, "pause"), (8, "continue")):
        assert search.tell(keys[0], kimg, (1.0,)) == verdict
    search.end(keys[0], failed=True)  # what is complete stays so, whatever comes after
    assert search.runs[keys[0]].state == "complete"


def test_a_leg_over_several_rungs_goes_on_through_those_on_its_way() -> None:
    search = GranularitySearch(replace(PLAN, rule="none"), 40)
    leg = search.ask()
    assert leg is not None and (leg.start_kimg, leg.stop_kimg) == (0, 8)
    assert [search.tell(leg.key, kimg, (1.0,)) for kimg in PLAN.rungs_kimg] == ["continue"] * 4


def test_nothing_at_present_is_not_the_end() -> None:
    search = GranularitySearch(PLAN, 8)
    leg = search.ask()
    assert leg is not None and search.ask() is None and not search.done  # the rest is kept back to finish it
    assert search.tell(leg.key, 1, (1.0,)) == "pause"
    following = search.ask()
    assert following is not None and following.key == leg.key and not search.done


def test_a_search_without_any_budget_is_done_at_once_and_stays_so() -> None:
    search = GranularitySearch(PLAN, 7)
    assert not search.done and search.ask() is None and search.done
    search.allowed_kimg = 1000
    assert search.ask() is None and search.done
