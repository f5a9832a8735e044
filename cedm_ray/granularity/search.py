"""The search over the number of clusters, by ask and tell: which training runs next, how far, and when all is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from cedm_ray.granularity.curve_model import CurveModel
from cedm_ray.granularity.rules import FittedChooser, RuleName, favourite, promotable, stopping_rung_passed
from cedm_ray.granularity.runs import Leg, Params, Run, Runs, RunState, mean_log_score, name_of
from cedm_ray.granularity.samplers import SamplerName, log_spaced, make_sampler

Verdict = Literal["continue", "pause", "stop"]


@dataclass(frozen=True)
class SearchPlan:
    """How a search over C goes about."""

    candidates: tuple[int, ...]
    """Numbers of clusters to choose from, ascending."""
    rungs_kimg: tuple[int, ...]
    """Where trainings are scored, ascending, in thousands of images."""
    rule: RuleName = "fitted"
    sampler: SamplerName = "gp"
    startup: int = 4
    """Trainings of a log-spaced design, before scores decide."""
    num_trials: int | None = None
    """Numbers of clusters to start at most (None: as many as the budget allows)."""
    eta: float = 2.0
    """One in so many goes on from a rung, in both variants of ASHA."""
    tolerance: float = 0.0005
    """When no leg is expected to lower ln(score) by more, the fitted rule only finishes the best training."""
    retrain_spread: float = 0.015
    """Expected standard deviation of ln(score) over retrainings."""
    objectives: int = 1
    """Scores that are minimised together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)) or self.candidates[0] < 1:
            raise ValueError(f"candidates are {self.candidates}; they must ascend from at least 1")


class GranularitySearch:
    """Chooses legs of training within a budget of images.

    Args:
        plan: How it goes about.
        allowed_kimg: What all its trainings may see together, in thousands of images; may be changed at any time.
        space: Of parameters beside ``num_clusters``, by dotted path: Optuna distribution and the design's value.
    """

    def __init__(
        self, plan: SearchPlan, allowed_kimg: float, space: Mapping[str, tuple[Any, Any]] | None = None
    ) -> None:
        space = dict(space or {})
        if space and plan.rule == "fitted":
            raise ValueError(f"the fitted rule searches over C alone, and the space holds {', '.join(space)}")
        self.plan, self.allowed_kimg = plan, allowed_kimg
        self.runs = Runs(plan.rungs_kimg)
        model = CurveModel(plan.candidates, plan.rungs_kimg, plan.retrain_spread)
        self._chooser = FittedChooser(model, plan.tolerance)
        self._sampler = make_sampler(plan.sampler, model, plan.seed, {name: d for name, (d, _) in space.items()})
        self._defaults = {name: value for name, (_, value) in space.items()}
        self._design = log_spaced(plan.candidates, plan.startup)
        self._ended = False

    @property
    def left_kimg(self) -> float:
        """What of the budget is not yet spent or promised to running trainings."""
        return self.allowed_kimg - self.runs.spent_kimg

    @property
    def done(self) -> bool:
        """Whether nothing more will be asked for, and nothing is running."""
        return self._ended

    def recall(
        self,
        params: Params,
        readings: Mapping[int, Sequence[float]],
        *,
        stop_kimg: int | None = None,
        stopped: bool = False,
    ) -> None:
        """Take in a training of an earlier process; one that did not reach the end may go on.

        Args:
            params: Its parameters.
            readings: Scores by kimg.
            stop_kimg: Where its last leg was to end, which it goes on to before anything else is asked for; None where
                that is not known.
            stopped: Whether the stopping variant of ASHA has stopped it for good.
        """
        known = {kimg: tuple(scores) for kimg, scores in sorted(readings.items()) if kimg in self.runs.rungs_kimg}
        whole = self.runs.total_kimg in known
        state: RunState = "complete" if whole else "stopped" if stopped else "paused"
        self.runs.add(Run(dict(params), state, max(stop_kimg or 0, *known, 0), known))

    def ask(self) -> Leg | None:
        """The leg to run now in one free place, which counts as running from then on.

        Returns:
            None where there is nothing to do at present, or where all is done.
        """
        if self._ended:
            return None
        leg = self._begun() or self._next()
        if leg is None and not self.runs.in_state("running"):
            leg = self._finishing()
            self._ended = leg is None
        return leg

    def _begun(self) -> Leg | None:
        """A training that an earlier process left half-way: in a leg, before its first rung, or where nobody pauses."""
        nobody_pauses = self.plan.rule in ("asha", "none")
        for run in self.runs.in_state("paused"):
            if 0 < run.target_kimg - run.reached_kimg <= self.left_kimg:  # what it costs was set aside for it
                return self._start(run, run.target_kimg)
            target = self._first_target()
            if (nobody_pauses or not run.readings) and self._affordable(target - run.reached_kimg, run):
                return self._start(run, target)
        return None

    def _next(self) -> Leg | None:
        for num_clusters in self._design:
            params = {"num_clusters": num_clusters, **self._defaults}
            if not self.runs.holds(params) and not self._full():
                return self._new(params)
        if self.plan.rule == "fitted":
            proposal = self._chooser.choose(self.runs, self._weights(), self.left_kimg, may_start=not self._full())
            if proposal is None:
                return None
            what, kimg = proposal
            return self._start(what, kimg) if isinstance(what, Run) else self._new({"num_clusters": what}, kimg)
        promoted = promotable(self.runs, self.plan.eta) if self.plan.rule == "promotion" else None
        if promoted is not None:
            target = self.runs.next_rung(promoted)
            if self._affordable(target - promoted.reached_kimg, promoted):
                return self._start(promoted, target)
        if self._full():
            return None
        proposed = self._sampler.propose(self.runs, self.plan.candidates, self._weights())
        return None if proposed is None else self._new(proposed)

    def _full(self) -> bool:
        return self.plan.num_trials is not None and len(self.runs) >= self.plan.num_trials

    def _finishing(self) -> Leg | None:
        """The best paused training that the rest of the budget can bring to its end."""
        if self.plan.rule in ("fitted", "none") and self.runs.in_state("complete"):
            return None
        paused = [
            run
            for run in self.runs.in_state("paused")
            if run.readings and self.runs.total_kimg - run.reached_kimg <= self.left_kimg
        ]
        best = favourite(paused) if self.plan.rule != "asha" else None
        return None if best is None else self._start(best, self.runs.total_kimg)

    def _first_target(self) -> int:
        return self.runs.rungs_kimg[0] if self.plan.rule in ("fitted", "promotion") else self.runs.total_kimg

    def _new(self, params: Params, kimg: int | None = None) -> Leg | None:
        target = kimg or self._first_target()
        if self._full() or not self._affordable(target):
            return None
        run = Run(dict(params), "paused", 0)
        self.runs.add(run)
        return self._start(run, target)

    def _affordable(self, cost_kimg: float, run: Run | None = None) -> bool:
        """Whether the budget holds so much and, where nothing is or will be complete, what finishes one training."""
        if any(each.target_kimg == self.runs.total_kimg for each in self.runs.in_state("complete", "running")):
            return cost_kimg <= self.left_kimg
        reached = [each.reached_kimg + (cost_kimg if each is run else 0) for each in self.runs.in_state("paused")]
        finish = self.runs.total_kimg - max([*reached, 0 if run else cost_kimg])
        return cost_kimg + finish <= self.left_kimg

    def _start(self, run: Run, target_kimg: int) -> Leg:
        run.state, run.target_kimg = "running", target_kimg
        return Leg(name_of(run.params), run.params, run.reached_kimg, target_kimg)

    def tell(self, key: str, kimg: int, scores: Sequence[float]) -> Verdict:
        """A training has scored at a rung.

        Args:
            key: Of the run.
            kimg: Images seen, in thousands.
            scores: One for each objective, lower is better.

        Returns:
            Whether it goes on, pauses (and may go on later), or stops for good.
        """
        run = self.runs[key]
        others = [other for other in self.runs if kimg in other.readings and other is not run]
        before = [mean_log_score(other.readings[kimg]) for other in others]
        run.readings[kimg] = tuple(scores)
        if kimg >= self.runs.total_kimg:
            run.state = "complete"
            return "continue"
        if self.plan.rule == "asha" and not stopping_rung_passed(before, mean_log_score(scores), self.plan.eta):
            run.state = "stopped"
            return "stop"
        if kimg < run.target_kimg:
            return "continue"
        run.state = "paused"
        return "pause"

    def end(self, key: str, failed: bool) -> None:
        """A training is over: by itself, stopped, or failed for good."""
        run = self.runs[key]
        if run.state != "complete":
            run.state = "failed" if failed else "stopped"

    def _weights(self) -> tuple[float, ...]:
        """Of the objectives: equal for one, else other ones at every decision, so that the whole front is searched.

        Source: Knowles 2006 (ParEGO) draws them at random; here they are the pieces of a stick that is broken at points
        of the golden ratio's sequence or, for more than two objectives, of the one that generalises it: evenly spread.
        """
        count = self.plan.objectives
        if count == 1:
            return (1.0,)
        step = 1 + sum(len(run.readings) for run in self.runs)
        root = 2.0
        for _ in range(64):  # converges to the root of root ** count = root + 1, the golden ratio for two
            root = (1 + root) ** (1 / count)
        cuts = sorted((step / root**i) % 1.0 for i in range(1, count))
        return tuple(b - a for a, b in pairwise([0.0, *cuts, 1.0]))
