import io
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.report.cluster_figures import metrics_figure, score_figure
from cedm_ray.report.curve_figures import curves_figure, efficiency_figure
from cedm_ray.report.grids import sample_grid
from cedm_ray.report.rows import Curve, Row, State, TieSet, best_row, metric_title
from cedm_ray.report.ticks import nice_ticks

ROWS = (
    Row(10, 1.0, 50, 9.0, "stopped"),
    Row(50, 0.999, 200, 5.0, "complete"),
    Row(100, 0.99, 200, 4.5, "complete"),
    Row(200, 0.97, 100, 4.0, "stopped"),
    Row(300, None, 20, None, "running"),
    Row(400, 0.93, 0, None, "probe"),
)


def draw(figure: Figure) -> Image.Image:
    out = io.BytesIO()
    figure.savefig(out, dpi=60)
    return Image.open(out)


def points(axes: Axes, label: str) -> list[list[float]]:
    (found,) = (c for c in axes.collections if str(c.get_label()).startswith(label))
    return np.asarray(found.get_offsets()).tolist()


def figure_of_rows() -> Figure:
    return score_figure(
        ROWS, metric="fd_lenet", c_max=320, utilization_cutoff=0.96, baselines={"unconditional": 8.0, "labels": 4.7}
    )


def test_every_trial_stands_where_its_numbers_say() -> None:
    upper, lower = figure_of_rows().axes
    assert points(upper, "trained to the full") == [[50, 5.0], [100, 4.5]]
    assert points(upper, "stopped early") == [[10, 9.0], [200, 4.0]]
    assert points(upper, "best: C = 100, 4.5") == [[100, 4.5]]  # a stopped trial is never the best
    assert points(lower, "trial") == [[10, 1.0], [50, 0.999], [100, 0.99], [200, 0.97]]
    assert points(lower, "probe") == [[400, 0.93]]


@pytest.mark.parametrize(("high", "scale"), [(7.0, "linear"), (70.0, "log")])
def test_scores_that_spread_widely_get_a_logarithmic_axis(high: float, scale: str) -> None:
    rows = [Row(5, 1.0, 1, high, "stopped"), Row(9, 1.0, 1, 2.0, "complete")]
    upper = score_figure(rows, metric="fid", c_max=None, utilization_cutoff=0.96, baselines={}).axes[0]
    assert upper.get_yscale() == scale
    low_limit, high_limit = upper.get_ylim()
    assert low_limit < 2 < high < high_limit


def test_stopped_trials_are_hollow_and_complete_ones_filled() -> None:
    upper = figure_of_rows().axes[0]
    faces = {str(c.get_label()): len(c.get_facecolor()) for c in upper.collections}
    assert faces["stopped early (last score)"] == 0
    assert faces["trained to the full budget"] == 1


@pytest.mark.parametrize(
    ("state", "label"),
    [("paused", "paused (last"), ("running", "still running (last"), ("failed", "failed (last")],
)
def test_a_trial_that_is_not_done_shows_its_last_score(state: State, label: str) -> None:
    rows = [*ROWS, Row(7, 1.0, 50, 1.5, state)]
    axes = score_figure(rows, metric="fid", c_max=None, utilization_cutoff=0.96, baselines={}).axes[0]
    assert points(axes, label) == [[7, 1.5]]
    assert points(axes, "best: C = 100") == [[100, 4.5]]


def test_bounds_and_baselines_are_drawn_in_their_panels() -> None:
    upper, lower = figure_of_rows().axes
    lines = {str(line.get_label()): (line.get_xdata()[0], line.get_ydata()[0]) for line in upper.lines}
    assert lines["unconditional: 8"][1] == 8.0
    assert lines["labels: 4.7"][1] == 4.7
    assert lines["$C_{max}$ = 320"][0] == 320
    below = {str(line.get_label()): (line.get_xdata()[0], line.get_ydata()[0]) for line in lower.lines}
    assert below["cutoff: 0.96"][1] == 0.96
    assert below["$C_{max}$ = 320"][0] == 320
    assert upper.get_xscale() == "log"
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_xlim()[0] < 10 < 400 < upper.get_xlim()[1]


@pytest.mark.parametrize("rows", [(), ROWS[:1], ROWS[-1:], (Row(1, None, 0, 0.0, "complete"),)])
def test_it_draws_with_next_to_nothing(rows: tuple[Row, ...]) -> None:
    figure = score_figure(rows, metric="fid", c_max=None, utilization_cutoff=0.96, baselines={})
    assert draw(figure).size == (540, 420)


@pytest.mark.parametrize("spread", [1, 100])
def test_no_label_overlaps_another_or_leaves_the_figure(spread: int) -> None:
    rows = [Row(c, 1 - c / 20_000, 10, 2 + spread * (i % 5), "complete") for i, c in enumerate(range(2, 500, 23))]
    figure = score_figure(rows, metric="fid", c_max=480, utilization_cutoff=0.96, baselines={"unconditional": 3.0})
    figure.draw_without_rendering()
    whole = figure.bbox
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
            boxes = [label.get_window_extent() for label in labels if label.get_visible()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        legend = axes.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        assert not box.overlaps(axes.get_window_extent())
        assert box.x1 <= whole.x1 + 1


TIE_SET = TieSet((50, 100), smallest=50, best=100, margin=0.12, low=4.5, high=5.04)


def tied_axes() -> Axes:
    rows = [
        *ROWS,
        Row(50, 0.999, 200, 4.9, "complete", train_seed=7),
        Row(100, 0.99, 200, 4.4, "complete", train_seed=8),
    ]
    given = {"metric": "fid", "c_max": 320, "utilization_cutoff": 0.96, "baselines": {}}
    return score_figure(rows, **given, interval=(300, 350), tie_set=TIE_SET).axes[0]  # type: ignore[arg-type]


def extent(axes: Axes, label: str) -> list[list[float]]:
    """Corners of a shade, (x, y) at the bottom left and at the top right, in data units."""
    (shade,) = (patch for patch in axes.patches if str(patch.get_label()).startswith(label))
    corners = axes.transData.inverted().transform(shade.get_extents().get_points())
    return np.asarray(corners).tolist()


def test_the_tie_set_is_filled_its_smallest_named_and_its_band_shaded() -> None:
    axes = tied_axes()
    assert points(axes, "tie set: C = 50, 100") == [[50, 5.0], [100, 4.5]]
    assert points(axes, "its smallest: C = 50") == [[50, 5.0]]
    (_, low), (_, high) = extent(axes, "within 12 % of the best")
    assert (low, high) == pytest.approx((4.5, 5.04))


def test_the_interval_of_c_max_is_shaded_in_both_panels() -> None:
    axes = tied_axes()
    for panel in axes.figure.axes:
        (left, _), (right, _) = extent(panel, "interval of $C_{max}$: [300, 350]")
        assert (left, right) == pytest.approx((300, 350))
    assert axes.get_xlim()[1] > 350


def test_repeated_trainings_are_apart_and_never_the_best() -> None:
    axes = tied_axes()
    assert points(axes, "trained again") == [[50, 4.9], [100, 4.4]]
    assert points(axes, "trained to the full") == [[50, 5.0], [100, 4.5]]
    assert points(axes, "best: C = 100, 4.5") == [[100, 4.5]]
    assert points(axes.figure.axes[1], "trial") == [[10, 1.0], [50, 0.999], [100, 0.99], [200, 0.97]]


def test_a_long_tie_set_is_named_by_its_ends() -> None:
    clusters = tuple(range(10, 100, 10))
    rows = [Row(c, 1.0, 1, 2.0, "complete") for c in clusters]
    tie_set = TieSet(clusters, 10, 50, 0.02, 2.0, 2.04)
    given = {"metric": "fid", "c_max": None, "utilization_cutoff": 0.96, "baselines": {}}
    axes = score_figure(rows, **given, tie_set=tie_set).axes[0]  # type: ignore[arg-type]
    assert len(points(axes, "tie set: C = 10, 20, 30, 40, …, 90")) == 9


def test_the_range_over_sets_of_images_is_a_line_from_the_least_to_the_most() -> None:
    rows = [Row(5, 1.0, 1, 2.0, "complete", sets=(2.1, 1.8, 2.1)), Row(9, 1.0, 1, 3.0, "complete", sets=(3.0,))]
    axes = score_figure(rows, metric="fid", c_max=None, utilization_cutoff=0.96, baselines={}).axes[0]
    (lines,) = (c for c in axes.collections if c.get_label() == "range over sets of images")
    assert [segment.tolist() for segment in lines.get_segments()] == [[[5, 1.8], [5, 2.1]]]


def test_metrics_stand_beside_each_other_with_the_front_ringed() -> None:
    fdd = [Row(r.num_clusters, r.utilization_ratio, r.kimg, r.score and 100 - r.score, r.state) for r in ROWS]
    fdd.append(Row(50, 1.0, 1, 96.0, "complete", train_seed=3))
    rows = {"fid": ROWS, "fdd": fdd}
    figure = metrics_figure(rows, baselines={"fdd": {"unconditional": 99.0}}, c_max=320, pareto=(50, 100))
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("FID", "FDD")
    assert points(left, "trained to the full") == [[50, 5.0], [100, 4.5]]
    assert points(right, "trained to the full") == [[50, 95.0], [100, 95.5]]
    assert points(right, "Pareto front (2)") == [[50, 95.0], [100, 95.5]]
    assert points(left, "best: C = 100") != points(right, "best: C = 50")
    assert [str(line.get_label()) for line in left.lines] == ["$C_{max}$ = 320"]
    assert [str(line.get_label()) for line in right.lines] == ["unconditional: 99", "$C_{max}$ = 320"]
    without = metrics_figure(rows, baselines={}, c_max=None)
    assert not any("Pareto" in str(c.get_label()) for axes in without.axes for c in axes.collections)


@pytest.mark.parametrize("count", [2, 3])
def test_the_legends_of_metrics_do_not_meet(count: int) -> None:
    rows = {name: ROWS for name in ("fid", "fdd", "fd_vit_base")[:count]}
    named = {name: {"unconditional": 1234.5, "superclasses (20)": 1187.25} for name in rows}
    figure = metrics_figure(rows, baselines=named, c_max=1320, interval=(1240, 1499), pareto=(50,))
    figure.draw_without_rendering()
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes]  # type: ignore[union-attr]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    for axes, box in zip(figure.axes, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= figure.bbox.y0 - 1
        assert box.y1 <= axes.xaxis.label.get_window_extent().y0


@pytest.mark.parametrize(
    ("low", "high", "due"),
    [
        (2.0, 2.3, [2.0, 2.1, 2.2, 2.3]),
        (100, 140, [100, 110, 120, 130, 140]),
        (2, 204, [2, 5, 10, 20, 50, 100, 200]),
        (0.4, 2.1, [0.5, 0.7, 1, 1.5, 2]),
    ],
)
def test_ticks_are_round_and_several(low: float, high: float, due: list[float]) -> None:
    assert [tick for tick in nice_ticks(low, high) if low <= tick <= high + 1e-9] == pytest.approx(due)


def test_ticks_of_clusters_are_whole() -> None:
    ticks = nice_ticks(20, 22, whole=True)
    assert {20, 21, 22} <= set(ticks) and all(tick == int(tick) for tick in ticks)


def test_curves_are_coloured_by_clusters_and_baselines_dashed() -> None:
    curves = [
        Curve("C = 200", 200, ((10.0, 9.0), (20.0, 5.0))),
        Curve("C = 10", 10, ((10.0, 8.0),)),
        Curve("unconditional", None, ((10.0, 12.0), (20.0, 7.0))),
    ]
    figure = curves_figure(curves, metric="fid")
    axes = figure.axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-", "-"]
    assert axes.lines[2].get_xydata().tolist() == [[10.0, 9.0], [20.0, 5.0]]
    assert axes.lines[1].get_color() != axes.lines[2].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unconditional"]
    draw(figure)


@pytest.mark.parametrize("curves", [[], [Curve("C = 5", 5, ())], [Curve("labels", None, ((1.0, 2.0),))]])
def test_curves_draw_with_next_to_nothing(curves: list[Curve]) -> None:
    assert draw(curves_figure(curves, metric="fd_lenet")).size == (480, 300)


OWN = Curve("C=20", 20, ((10_000.0, 16.0), (40_000.0, 4.0), (80_000.0, 2.0)))
OTHERS = (
    Curve("unconditional", None, ((10_000.0, 32.0), (40_000.0, 8.0))),
    Curve("labels (10)", None, ((40_000.0, 1.0),)),
)


def test_the_efficiency_is_drawn_from_the_best_of_the_other_to_where_the_one_is_as_good() -> None:
    figure = efficiency_figure(OWN, OTHERS, metric="fid")
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[10, 16], [40, 4], [80, 2]],
        [[10, 32], [40, 8]],
        [[40, 1]],
    ]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["C=20", "unconditional, factor 2", "labels (10), factor n.a."]
    arrow, number = axes.texts
    # Between 16 at 10 and 4 at 40 the score halves when the images double: 8 at 20.
    assert (arrow.xyann, arrow.xy) == ((40, 8), (pytest.approx(20), 8))
    assert number.get_text() == "2" and number.xy[0] == pytest.approx(800**0.5)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    draw(figure)


def test_an_efficiency_that_is_a_bound_says_so() -> None:
    figure = efficiency_figure(OWN, [Curve("unconditional", None, ((40_000.0, 20.0),))], metric="fid")
    assert figure.legends[0].get_texts()[1].get_text() == "unconditional, factor ≥ 4"
    draw(figure)


def test_figures_leave_no_pyplot_state() -> None:
    figure_of_rows()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_a_grid_shows_each_pixel_as_a_square_in_reading_order() -> None:
    images = np.arange(5 * 64, dtype=np.uint16).reshape(5, 1, 8, 8).astype(np.uint8)
    grid = np.asarray(sample_grid(images, 3))
    assert grid.shape == (2 + 2 * 50, 2 + 3 * 50, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 50, 2 + i % 3 * 50
        tile = grid[top : top + 48, left : left + 48]
        np.testing.assert_array_equal(tile[3::6, 3::6, 1], images[i, 0])
        np.testing.assert_array_equal(
            tile, np.asarray(Image.fromarray(images[i, 0]).convert("RGB").resize((48, 48), 0))
        )
    assert (grid[52:, 102:] == 255).all()
    assert (grid[:2] == 255).all()
    assert (grid[50:52] == 255).all()


def test_large_colour_images_keep_their_size_and_channels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    grid = np.asarray(sample_grid(images, 8, gap=0))
    np.testing.assert_array_equal(grid[:, 64:], images[1].transpose(1, 2, 0))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 2, 8, 8), (2, 8, 8)])
def test_a_grid_of_no_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is due"):
        sample_grid(np.zeros(shape, dtype=np.uint8), 2)
    with pytest.raises(ValueError, match="columns is 0"):
        sample_grid(np.zeros((1, 1, 8, 8), dtype=np.uint8), 0)


def test_the_best_row_is_complete_and_the_smaller_of_equals() -> None:
    assert best_row(ROWS) == ROWS[2]
    assert best_row([Row(9, 1.0, 1, 4.5, "complete"), ROWS[2]]) == Row(9, 1.0, 1, 4.5, "complete")
    assert best_row([ROWS[2], Row(9, 1.0, 1, 4.5, "complete")]) == Row(9, 1.0, 1, 4.5, "complete")
    assert best_row(ROWS[3:]) is None


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_clusters is 0"):
        Row(0, 1.0, 1, 1.0, "complete")
    with pytest.raises(ValueError, match="state is 'done'; it must be one of complete, stopped"):
        Row(1, 1.0, 1, 1.0, "done")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score is nan"):
        Row(1, 1.0, 1, float("nan"), "complete")


def test_only_published_names_stand_alone() -> None:
    assert [metric_title(name) for name in ("fid", "fdd", "fd_lenet")] == ["FID", "FDD", "FD (lenet)"]
