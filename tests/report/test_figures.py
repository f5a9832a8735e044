import io
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.report.figures import curves_figure, score_figure
from cedm_ray.report.grids import sample_grid
from cedm_ray.report.rows import Curve, Row, best_row, metric_title

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
    assert draw(figure).size == (480, 420)


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
