"""From a score, as the metrics give it, to a row of a table, as the report wants it."""

from __future__ import annotations

from cedm_ray.metrics.scores import Score
from cedm_ray.report.rows import ScoreRow


def score_row(score: Score) -> ScoreRow:
    """A score as a row of a table."""
    return ScoreRow(
        score.metric, score.value, score.std, score.detector, score.num_images, score.num_reference, score.num_sets
    )
