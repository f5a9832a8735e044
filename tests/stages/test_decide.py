import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.decision import Trained, pareto_front, tie_set
from cedm_ray.settings import FinalSettings, GranularitySettings, ScoreSettings
from cedm_ray.stages import decide as module
from cedm_ray.stages.decide import Decision, confirm, decide, score_at
from cedm_ray.stages.training.records import State, TrialRecord

END_KIMG = 8
CONFIG = SearchConfig(
    granularity=GranularitySettings(total_kimg=END_KIMG, grace_kimg=1, retrain_spread=0.02),
    final=FinalSettings(total_kimg=20), seed=5,
)  # fmt: skip
SEVERAL = CONFIG.model_copy(
    update={
        "granularity": replace(CONFIG.granularity, multi_objective=True),
        "score": ScoreSettings(also=("dinov2",)),
    }
)
METRICS = ("fid", "fdd")


def trial(num_clusters: int, *sets: float, kimg: int = END_KIMG, grouping: str = "temi", state: State = "complete",
          fdd: float = 100.0, **others: Any) -> TrialRecord:  # fmt: skip
    """A training whose last rung has these sets of scores; a worse rung stands before it."""
    score = sum(sets) / len(sets)
    rungs: list[dict[str, Any]] = [{"kimg": 1, "score": 9 * score, "fid": 9 * score, "fdd": 9 * fdd}]
    rungs.append({"kimg": kimg, "score": score, "fid": score, "fdd": fdd, "score_sets": list(sets)})
    params = {"grouping": grouping, "num_clusters": num_clusters, **others}
    key = repr(sorted(params.items()))
    return TrialRecord(key, f"C={num_clusters}", grouping, num_clusters, params, state, rungs=tuple(rungs))


def decided(*records: TrialRecord, config: SearchConfig = CONFIG) -> Decision:
    found = decide(records, config, METRICS)
    assert found is not None
    return found


def test_the_ties_are_those_of_the_scores_at_the_end_of_the_search() -> None:
    records = [
        trial(10, 2.00, 2.02, 1.98), trial(14, 2.03, 2.05, 2.01), trial(20, 2.6, 2.61, 2.59),
        trial(30, 1.0, kimg=4, state="stopped"), trial(1, 1.0, grouping="none"), trial(10, 1.0, grouping="labels"),
    ]  # fmt: skip
    found = decided(*records)
    trained = [Trained(10, (2.00, 2.02, 1.98)), Trained(14, (2.03, 2.05, 2.01)), Trained(20, (2.6, 2.61, 2.59))]
    assert found.ties == tie_set(trained, retrain_spread=0.02)
    assert found.ties.clusters == (10, 14) and found.best is records[0] and found.pareto is None


def test_a_training_that_went_on_to_the_full_budget_stands_with_its_score_at_the_end_of_the_search() -> None:
    one, other = trial(10, 2.0), trial(14, 2.5)
    on = other.with_rung({"kimg": 20, "score": 1.0, "fid": 1.0, "fdd": 1.0})
    assert decided(one, on) == decided(one, other)
    assert score_at(on, CONFIG, METRICS) == (2.5,)


def test_what_was_trained_to_the_end_counts_whatever_became_of_it() -> None:
    # Its training to the full budget was cut off, or failed: its score at the end of the search stays.
    for state in ("running", "failed", "stopped"):
        assert decided(trial(10, 2.0, state=cast(State, state)), trial(14, 3.0)).ties.best == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("config", [CONFIG, SEVERAL], ids=["one", "several"])
def test_a_score_that_is_no_distance_does_not_count(bad: float, config: SearchConfig) -> None:
    assert score_at(trial(10, bad), config, METRICS) is None
    assert decide([trial(10, bad)], config, METRICS) is None
    found = decided(trial(10, bad), trial(14, 2.0), config=config)
    assert found.ties.clusters == (14,)
    if config is SEVERAL:
        assert decide([trial(10, 2.0, fdd=bad)], config, METRICS) is None
    else:
        assert score_at(trial(10, 2.0, bad), config, METRICS) is None


def test_without_a_training_to_the_end_there_is_no_decision() -> None:
    assert decide([], CONFIG, METRICS) is None
    assert decide([trial(10, 2.0, kimg=4), trial(1, 2.0, grouping="none")], CONFIG, METRICS) is None


def test_retrainings_count_as_trainings_of_their_c_and_the_best_of_them_goes_on() -> None:
    records = [trial(10, 2.0), trial(14, 2.1), trial(10, 2.3, train_seed=6), trial(14, 2.0, train_seed=6)]
    found = decided(*records)
    trained = [Trained(10, (2.0,)), Trained(10, (2.3,)), Trained(14, (2.1,)), Trained(14, (2.0,))]
    assert found.ties == tie_set(trained, retrain_spread=0.02)
    assert found.ties.best == 14 and found.best is records[3]


def test_a_c_stands_with_the_settings_under_which_it_scores_best() -> None:
    dropout = "diffusion.dropout"
    records = [
        trial(10, 2.5, **{dropout: 0.0}), trial(10, 2.0, **{dropout: 0.1}), trial(14, 2.02, **{dropout: 0.0}),
        trial(10, 2.04, **{dropout: 0.1}, train_seed=6),
    ]  # fmt: skip
    found = decided(*records)
    trained = [Trained(10, (2.0,)), Trained(10, (2.04,)), Trained(14, (2.02,))]
    assert found.ties == tie_set(trained, retrain_spread=0.02) and found.best is records[1]


def test_of_several_scores_the_geometric_mean_decides_and_the_front_is_shown() -> None:
    records = [trial(10, 2.0, fdd=90.0), trial(14, 3.0, fdd=50.0), trial(20, 3.5, fdd=95.0), trial(30, 1.9, fdd=300.0)]
    found = decided(*records, config=SEVERAL)
    trained = [Trained(c, (math.sqrt(a * b),)) for c, a, b in ((10, 2, 90), (14, 3, 50), (20, 3.5, 95), (30, 1.9, 300))]
    expected = tie_set(trained, retrain_spread=0.02)
    assert (found.ties.best, found.ties.clusters) == (expected.best, expected.clusters) == (14, (14,))
    assert found.ties.low == pytest.approx(expected.low) == pytest.approx(math.sqrt(150))
    assert found.pareto == (10, 14, 30)


def test_the_front_is_that_of_the_means_over_retrainings() -> None:
    records = [trial(10, 2.0, fdd=100.0), trial(14, 2.1, fdd=101.0), trial(10, 2.4, fdd=104.0, train_seed=6)]
    found = decided(*records, config=SEVERAL)
    assert found.pareto == pareto_front({10: (2.2, 102.0), 14: (2.1, 101.0)}) == (14,)


def test_the_decision_in_words() -> None:
    assert decided(trial(10, 2.0), trial(14, 3.0)).sentence() == (
        "the best number of clusters is 10; no other one that was trained to the end ties with it"
    )
    tied = decided(trial(12, 2.0), trial(10, 2.01), trial(30, 4.0)).sentence()
    margin = tie_set([Trained(12, (2.0,)), Trained(10, (2.01,)), Trained(30, (4.0,))], retrain_spread=0.02).margin
    assert tied.startswith("the best number of clusters is 12; 10, 12 tie (") and tied.endswith("of them is 10")
    assert f"{margin:.1%}" in tied
    labels = CONFIG.model_copy(update={"grouping": "labels"})
    given = decided(replace(trial(10, 2.0, grouping="labels"), label="labels (10)"), config=labels)
    assert given.sentence() == "labels (10) is trained to the end of the search: score 2"


class Confirmed:
    """Runs :func:`confirm` over records, and keeps what it would train and says."""

    def __init__(self, records: list[TrialRecord], monkeypatch: pytest.MonkeyPatch, *, times: int = 2,
                 room: int | None = None, config: SearchConfig = CONFIG) -> None:  # fmt: skip
        self.trained: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.at_once: int | None = None
        config = config.model_copy(update={"confirm": times})

        def tune_trials(ctx: Any, ledger: Any, stage: str, embeddings: Any, source: Any, *, at_once: int) -> None:
            assert stage == "confirm"
            self.at_once = at_once
            while (leg := source.ask()) is not None:
                self.trained.append(leg.params)

        monkeypatch.setattr(module, "tune_trials", tune_trials)
        terminal = SimpleNamespace(line=lambda text, style="": self.said.append(text), stage=self._stage)
        shares = SimpleNamespace(max_trials=3)
        ctx = SimpleNamespace(config=config, terminal=terminal, board=None, shares=shares)
        ledger = SimpleNamespace(records=records, planner=SimpleNamespace(scoring=SimpleNamespace(metrics=METRICS)))
        account = SimpleNamespace(retrainings=lambda _: room)
        confirm(
            cast(Any, ctx), cast(Any, ledger), decided(*records, config=config), cast(Any, None), cast(Any, account)
        )

    def _stage(self, title: str, board: Any) -> Any:
        self.said.append(title)
        return nullcontext()

    def seeds(self) -> list[tuple[int, int]]:
        return [(params["num_clusters"], params["train_seed"]) for params in self.trained]


TIED = [trial(10, 2.02), trial(14, 2.0), trial(20, 2.6), trial(1, 1.0, grouping="none")]


def test_every_c_of_the_tie_set_is_retrained_with_fresh_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Confirmed(TIED, monkeypatch)
    assert made.seeds() == [(14, 6), (10, 6), (14, 7), (10, 7)]
    assert all(set(params) == {"grouping", "num_clusters", "train_seed"} for params in made.trained)
    assert made.said == ["retraining C = 10, 14 with fresh seeds"] and made.at_once() == 3


def test_retrainings_that_are_complete_are_not_repeated_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [trial(14, 2.5, train_seed=6), trial(10, 2.0, kimg=4, state="running", train_seed=6)]
    assert Confirmed([*TIED, *known], monkeypatch, times=1).seeds() == [(10, 6)]
    # A retraining that went badly changes nothing of what is wanted: 14 still comes before 10.
    assert Confirmed([*TIED, trial(14, 2.1, train_seed=6)], monkeypatch).seeds() == [(10, 6), (14, 7), (10, 7)]
    everything = [trial(c, 2.0, train_seed=6) for c in (10, 14)]
    done = Confirmed([*TIED, *everything], monkeypatch, times=1)
    assert done.trained == [] and done.said == []


def test_retrainings_have_the_settings_under_which_their_c_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = "diffusion.dropout"
    records = [trial(10, 2.5, **{dropout: 0.0}), trial(10, 2.0, **{dropout: 0.1}), trial(14, 2.01, **{dropout: 0.2})]
    made = Confirmed(records, monkeypatch, times=1)
    assert [(params["num_clusters"], params[dropout]) for params in made.trained] == [(10, 0.1), (14, 0.2)]


@pytest.mark.parametrize(("room", "seeds"), [(0, []), (1, [(14, 6)]), (3, [(14, 6), (10, 6), (14, 7)])])
def test_the_budget_limits_retrainings_and_the_lowest_score_comes_first(
    room: int, seeds: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Confirmed(TIED, monkeypatch, room=room)
    assert made.seeds() == seeds and made.said[0] == f"the budget holds {room} of 4 retrainings"
    assert Confirmed(TIED, monkeypatch, room=4).said == ["retraining C = 10, 14 with fresh seeds"]


def test_params_of_a_trial_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Mapping[str, Any]] = [dict(record.params) for record in TIED]
    Confirmed(TIED, monkeypatch)
    assert [record.params for record in TIED] == before
