import io
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.report.bound_figure import FittedCurve, ProbePoint, bound_figure

POINTS = (
    ProbePoint(100, 1.0, "full"),
    ProbePoint(400, 0.985, "full"),
    ProbePoint(400, 0.981, "full"),
    ProbePoint(400, 0.97, "low"),
    ProbePoint(800, 0.93, "low"),
)
CURVE = FittedCurve((100.0, 400.0, 800.0), (0.999, 0.983, 0.94), (0.99, 0.97, 0.92), (1.0, 0.99, 0.95))


def figure_of(points: tuple[ProbePoint, ...] = POINTS, **changed: Any) -> Figure:
    given = {"curve": CURVE, "cutoff": 0.96, "c_max": 642, "interval": (610, 676), "confidence": 0.95}
    return bound_figure(points, **{**given, **changed})


def draw(figure: Figure) -> Image.Image:
    out = io.BytesIO()
    figure.savefig(out, dpi=60)
    return Image.open(out)


def readings(axes: Axes) -> dict[str, list[list[float]]]:
    return {
        str(c.get_label()): np.asarray(c.get_offsets()).tolist() for c in axes.collections if len(c.get_offsets()) > 0
    }


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("$C_{max}$", "C_max")


def height_of(axes: Axes, ratio: float) -> float:
    """Where a ratio stands between the bottom (0) and the top (1) of the axes."""
    pixel = axes.transData.transform((axes.get_xlim()[0], ratio))
    return float(axes.transAxes.inverted().transform(pixel)[1])


def test_every_reading_stands_where_it_was_read_apart_by_fidelity() -> None:
    found = readings(figure_of().axes[0])
    assert found["probe at full fidelity (3)"] == [[100, 1.0], [400, 0.985], [400, 0.981]]
    assert found["probe at low fidelity (2)"] == [[400, 0.97], [800, 0.93]]


def test_each_fidelity_has_a_marker_of_its_own() -> None:
    shapes = [c.get_paths()[0].vertices.tobytes() for c in figure_of(curve=None).axes[0].collections]
    assert len(shapes) == len(set(shapes)) == 2


def test_repeats_that_agree_are_darker_than_a_single_reading() -> None:
    def brightness(copies: int) -> int:
        figure = figure_of((ProbePoint(100, 0.9, "full"),) * copies, curve=None)
        out = io.BytesIO()
        figure.savefig(out, dpi=figure.dpi)
        pixels = np.asarray(Image.open(out).convert("RGB"))
        x, y = figure.axes[0].transData.transform((100, 0.9))
        return int(pixels[len(pixels) - 1 - int(y), int(x)].sum())

    assert brightness(3) < brightness(2) - 30 < brightness(1) - 60 < 3 * 255 - 60


def test_the_bounds_are_drawn_at_their_values() -> None:
    axes = figure_of().axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert lines["cutoff: 0.96"].get_ydata()[0] == 0.96
    assert lines["cutoff: 0.96"].get_linestyle() == "--"
    assert lines["$C_{max}$ = 642"].get_xdata()[0] == 642
    assert lines["fitted curve"].get_xydata().tolist() == [[100, 0.999], [400, 0.983], [800, 0.94]]
    (shade,) = axes.patches
    assert (shade.get_extents().x0, shade.get_extents().x1) == tuple(
        axes.transData.transform([(610, 1), (676, 1)])[:, 0]
    )
    (band,) = (c for c in axes.collections if c.get_label() == "band of the fit")
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners >= {(400, 0.97), (400, 0.99), (800, 0.92), (800, 0.95)}
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        ({}, "C_max = 642, 95 % interval [610, 676]"),
        ({"confidence": 0.999}, "C_max = 642, 99.9 % interval [610, 676]"),
        ({"confidence": None}, "C_max = 642, interval [610, 676]"),
        ({"interval": (610, None)}, "C_max = 642, 95 % interval from 610, open above"),
        ({"interval": None}, "C_max = 642"),
        ({"c_max": None}, "C_max not found yet, 95 % interval [610, 676]"),
        ({"c_max": None, "interval": None, "confidence": None}, "C_max not found yet"),
    ],
)
def test_the_title_says_what_was_found(changed: dict[str, Any], due: str) -> None:
    assert title(figure_of(**changed)) == due


def test_an_open_interval_is_shaded_to_the_edge() -> None:
    axes = figure_of(interval=(610, None)).axes[0]
    (shade,) = axes.patches
    right = axes.transAxes.inverted().transform((shade.get_extents().x1, 0))[0]
    assert right == pytest.approx(1)
    assert "95 % interval, open" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_without_an_interval_nothing_is_shaded() -> None:
    assert len(figure_of(interval=None).axes[0].patches) == 0


@pytest.mark.parametrize("cutoff", [0.9, 0.96, 0.99, 1.0])
@pytest.mark.parametrize("worst", [0.95, 0.4, 0.0])
def test_the_cutoff_stays_readable_whatever_the_worst_reading(cutoff: float, worst: float) -> None:
    axes = figure_of((*POINTS, ProbePoint(9000, worst, "low")), cutoff=cutoff).axes[0]
    assert 0.02 < height_of(axes, worst) < height_of(axes, 1.0) < 0.98
    if cutoff < 1:
        assert 0.1 < height_of(axes, 1.0) - height_of(axes, cutoff) < 0.6
    heights = [height_of(axes, ratio) for ratio in (0.0, 0.2, 0.5, 0.9, 0.95, 0.99, 1.0)]
    assert heights == sorted(set(heights))


def test_the_axis_says_when_it_is_not_linear() -> None:
    plain, compressed = (figure_of((*POINTS, ProbePoint(900, r, "low"))).axes[0] for r in (0.9, 0.4))
    assert (plain.get_yscale(), plain.get_ylabel()) == ("linear", "share of clusters used, $r_C$")
    assert compressed.get_ylabel() == "share of clusters used, $r_C$ (compressed below the cutoff)"
    assert {1.0, 0.96, 0.4} <= {round(tick, 9) for tick in compressed.get_yticks()}


def test_a_low_cutoff_asks_for_no_room_below_zero() -> None:
    axes = figure_of((ProbePoint(9, 0.5, "full"),), cutoff=0.1, curve=None).axes[0]
    assert -0.1 < axes.get_ylim()[0] < 0 < 1 < axes.get_ylim()[1] < 1.1


def test_a_curve_beyond_the_readings_does_not_widen_the_axes() -> None:
    far = FittedCurve((1.0, 400.0, 1e6), (1.0, 0.98, 0.01), (1.0, 0.97, 0.0), (1.0, 0.99, 0.1))
    axes = figure_of(curve=far).axes[0]
    assert axes.get_xlim() == pytest.approx((80, 1000))
    assert axes.get_ylim()[0] > 0.9


@pytest.mark.parametrize(
    ("points", "changed"),
    [
        ((), {"curve": None, "c_max": None, "interval": None, "confidence": None}),
        (POINTS[:1], {"curve": None, "c_max": None, "interval": (100, None)}),
        (POINTS[:3], {"curve": None, "c_max": 400, "interval": (400, None)}),  # capped
        ((ProbePoint(2, 0.5, "low"),), {"curve": None, "c_max": 2, "interval": (2, 2), "cutoff": 1.0}),
        ((ProbePoint(1, 1.0, "full"),), {"curve": FittedCurve((), (), (), ()), "c_max": 10**6}),
    ],
)
def test_it_draws_with_next_to_nothing(points: tuple[ProbePoint, ...], changed: dict[str, Any]) -> None:
    assert draw(figure_of(points, **changed)).size == (480, 300)


@pytest.mark.parametrize("cutoff", [0.9, 0.96, 0.97, 0.99])
@pytest.mark.parametrize("worst", [0.95, 0.4, 0.0])
def test_no_label_overlaps_another_or_leaves_the_figure(cutoff: float, worst: float) -> None:
    figure = figure_of((*POINTS, ProbePoint(9000, worst, "low")), cutoff=cutoff)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        labels = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())
    for box in (legend, axes.yaxis.label.get_window_extent()):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cutoff": 0.0}, r"cutoff is 0.0; it must lie in \(0, 1\]"),
        ({"cutoff": 1.2}, "cutoff is 1.2"),
        ({"c_max": 0}, "c_max is 0; it must be at least 1"),
        ({"interval": (676, 610)}, r"interval is \(676, 610\); it must ascend from at least 1"),
        ({"interval": (0, None)}, r"interval is \(0, None\)"),
        ({"confidence": 95.0}, r"confidence is 95.0; it must lie in \(0, 1\)"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure_of(**changed)


def test_readings_and_curves_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_clusters is 0; it must be at least 1"):
        ProbePoint(0, 1.0, "full")
    for ratio in (1.01, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"ratio is {ratio}; it must lie in \[0, 1\]"):
            ProbePoint(5, ratio, "full")
    with pytest.raises(ValueError, match="fidelity is 'half'; it must be one of full, low"):
        ProbePoint(5, 1.0, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of values in low is 1; it must be 2, one for each num_clusters"):
        FittedCurve((1.0, 2.0), (1.0, 0.9), (1.0,), (1.0, 1.0))
