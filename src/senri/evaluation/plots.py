"""Figures of a report as PNG: drawn off screen, the same pixels for the same figure."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senri.evaluation.report import Curves, HeatMap, Series
from senri.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
# Okabe and Ito's palette: told apart with every kind of colour vision. Its yellow is too faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES = ((0, (5, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))
_GREY = "#5f5f5f"
_FEW_POINTS = 3  # up to here a band would be a bare line or triangle: error bars instead
_MANY_POINTS = 24  # from here markers would merge into a thick line
_CHARS_PER_INCH = 11.5  # of text at 10 points, on the safe side
_MAX_WIDTH = 9.0  # inches of a row of heat maps; further panels go below
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.formatter.useoffset": False,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "grid.color": "#e4e4e4",
    "hatch.color": "#cccccc",
    "hatch.linewidth": 0.8,
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a "$" in a name is a "$"
}


def draw(figure: Curves | HeatMap, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        ValueError: matplotlib is missing, the figure contradicts itself, or the file cannot be written.
    """
    write_atomically(path, render(figure))


def render(figure: Curves | HeatMap) -> bytes:
    """The PNG of a figure.

    Raises:
        ValueError: matplotlib is missing, or the figure contradicts itself.
    """
    buffer = io.BytesIO()
    with _style():
        build(figure).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def build(figure: Curves | HeatMap) -> Figure:
    """The matplotlib figure behind ``render``, with the same errors."""
    with _style():
        if isinstance(figure, Curves):
            _check_curves(figure)
            return _curves(figure)
        _check_heat_map(figure)
        return _heat_map(figure)


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults with our changes, whatever the user's matplotlibrc says."""
    try:
        from matplotlib import style
    except ModuleNotFoundError:
        raise ValueError("plots need matplotlib: pip install 'senri[eval]'") from None
    with style.context(["default", _STYLE]):
        yield


def _check_curves(figure: Curves) -> None:
    for series in figure.series:
        lengths = {len(series.x), len(series.y)}
        if series.low or series.high:
            lengths |= {len(series.low), len(series.high)}
        if len(lengths) > 1:
            raise ValueError(f"figure {figure.name!r}: {series.name!r} has {sorted(lengths)} values for its points")
        if figure.log_x and any(x <= 0 for x in series.x):
            raise ValueError(
                f"figure {figure.name!r}: {series.name!r} has an x that is no logarithm's: {min(series.x)}"
            )


def _check_heat_map(figure: HeatMap) -> None:
    if not (figure.panels and figure.rows and figure.columns):
        raise ValueError(f"figure {figure.name!r}: no panels, rows or columns")
    for name, values in figure.panels:
        if len(values) != len(figure.rows) or any(len(row) != len(figure.columns) for row in values):
            shape = f"{len(figure.rows)} × {len(figure.columns)}"
            raise ValueError(f"figure {figure.name!r}: the values of {name!r} are not {shape}")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07))


def _curves(figure: Curves) -> Figure:
    width, names = 7.2, [textwrap.fill(series.name, 78) for series in figure.series]
    longest = max((len(line) for name in names for line in name.split("\n")), default=1)
    columns = max(1, min(len(names), int(width * _CHARS_PER_INCH / (longest + 8))))
    lines = sum(name.count("\n") + 1 for name in names) / columns
    fig = _figure(width, 3.9 + 0.19 * math.ceil(lines))
    axes = fig.subplots()
    fig.suptitle(textwrap.fill(figure.title, 78), x=0.012, ha="left")
    axes.set_xlabel(textwrap.fill(figure.x_label, 70))
    axes.set_ylabel(textwrap.fill(figure.y_label, 38))
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    _x_axis(axes, figure)
    measured = [series for series in figure.series if not series.dashed]
    references = [series for series in figure.series if series.dashed]
    handles = {id(s): _reference(axes, s, i) for i, s in enumerate(references)}
    handles |= {id(s): _measurement(axes, figure, s, i, len(measured)) for i, s in enumerate(measured)}
    if figure.y_range is not None:
        axes.set_ylim(*figure.y_range)
    if names:
        fig.legend(
            [handles[id(s)] for s in figure.series], names, loc="outside lower center", ncols=columns, frameon=False
        )
    return fig


def _reference(axes: Axes, series: Series, index: int) -> Any:
    """A dashed line; one point alone is a level, drawn across the whole width."""
    look: dict[str, Any] = {"color": _GREY, "linewidth": 1.4, "linestyle": _DASHES[index % len(_DASHES)]}
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=_GREY, alpha=0.12, linewidth=0)
    if len(series.x) == 1:
        return axes.axhline(series.y[0], **look)
    return axes.plot(series.x, series.y, **look)[0]


def _measurement(axes: Axes, figure: Curves, series: Series, index: int, count: int) -> Any:
    colour = _COLOURS[index % len(_COLOURS)]
    low, high = figure.y_range or (-math.inf, math.inf)
    curve = axes.plot(
        series.x,
        series.y,
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)] if len(series.x) <= _MANY_POINTS else None,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.8,
        zorder=3,
        clip_on=not all(low <= y <= high for y in series.y),  # whole markers on the edge of the range
    )[0]
    few = 0 < len(series.x) <= _FEW_POINTS
    if series.low and not few:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)
    if few:
        bars = _error_bars(axes, series, colour) if series.low else []
        widest = max(len(s.x) for s in figure.series)
        _shift([curve, *bars], axes, 24 / widest * (index - (count - 1) / 2))
    return curve


def _error_bars(axes: Axes, series: Series, colour: str) -> list[Any]:
    middle = [(low + high) / 2 for low, high in zip(series.low, series.high, strict=True)]
    half = [(high - low) / 2 for low, high in zip(series.low, series.high, strict=True)]
    bars = axes.errorbar(series.x, middle, half, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3)
    return [*bars.lines[1], *bars.lines[2]]


def _shift(artists: list[Any], axes: Axes, points: float) -> None:
    """Move a series aside by ``points`` (1/72 inch): error bars at one x would hide each other."""
    from matplotlib.transforms import ScaledTranslation

    aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
    for artist in artists:
        artist.set_transform(axes.transData + aside)


def _x_axis(axes: Axes, figure: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    values = sorted({x for series in figure.series for x in series.x})
    if figure.log_x and values:
        _log_axis(axes, values)
    elif all(float(x).is_integer() for x in values):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if len(values) == 1:
            axes.set_xlim(values[0] - 1, values[0] + 1)


def _log_axis(axes: Axes, values: list[float]) -> None:
    """Ticks at the measured ``values`` (ascending), as many as have room for their labels."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    span = max(math.log2(values[-1] / values[0]), 1.0)
    axes.set_xlim(values[0] / 2 ** (0.06 * span), values[-1] * 2 ** (0.06 * span))
    ticks = [values[0]]
    for x in values[1:]:
        # 5.5 inches of axis: the labels of two neighbours must fit beside each other
        needed = (len(_count(ticks[-1])) + len(_count(x))) / 2 / _CHARS_PER_INCH + 0.12
        if math.log2(x / ticks[-1]) / span * 5.5 >= needed:
            ticks.append(x)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([_count(x) for x in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _count(x: float) -> str:
    """4096 as "4K", 1048576 as "1M" (powers of 1024); other numbers in full."""
    if x >= 2**20 and x % 2**20 == 0:
        return f"{x / 2**20:.0f}M"
    if x >= 2**10 and x % 2**10 == 0:
        return f"{x / 2**10:.0f}K"
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:g}"


def _heat_map(figure: HeatMap) -> Figure:
    from matplotlib.ticker import PercentFormatter

    panel_width = max(1.7, 0.56 * len(figure.columns))
    per_row = min(len(figure.panels), max(1, int(_MAX_WIDTH / panel_width)))
    down = math.ceil(len(figure.panels) / per_row)
    per_row = math.ceil(len(figure.panels) / down)  # 6 panels as 3 + 3 rather than 5 + 1
    names = [textwrap.fill(name, int(panel_width * _CHARS_PER_INCH)) for name, _ in figure.panels]
    panel_height = max(1.2, 0.38 * len(figure.rows)) + 0.4 + 0.16 * max(name.count("\n") + 1 for name in names)
    size = (panel_width * per_row + 1.6, panel_height * down + 0.75)
    fig = _figure(*size)
    fig.suptitle(textwrap.fill(figure.title, int(size[0] * 10)), x=0.06 / size[0], ha="left")
    grid = fig.subplots(down, per_row, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    used = list(grid.flat[: len(names)])
    for axes, name, (_, values) in zip(used, names, figure.panels, strict=True):
        axes.set_title(name)
        mesh = _panel(axes, figure, values)
    for axes in grid[:, 0]:
        axes.set_ylabel(textwrap.fill(figure.y_label, int(panel_height * 11)))
    fig.supxlabel(textwrap.fill(figure.x_label, int(size[0] * 10)), fontsize=9.5)
    bar = fig.colorbar(mesh, ax=used, ticks=(0, 0.25, 0.5, 0.75, 1), format=PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)  # type: ignore[operator]
    return fig


def _panel(axes: Axes, figure: HeatMap, values: tuple[tuple[float | None, ...], ...]) -> Any:
    """Draw the cells of one arm; returns what the colour bar is made for."""
    import numpy as np

    masked = np.ma.masked_invalid(np.array(values, dtype=float))  # None is NaN here
    mesh = axes.pcolormesh(masked, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            _cell(axes, mesh, column, row, value)
    axes.set_xlim(0, len(figure.columns))
    axes.set_ylim(len(figure.rows), 0)
    long = max(len(label) for label in figure.columns) > 6
    rotation: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks([i + 0.5 for i in range(len(figure.columns))], figure.columns, **rotation)
    axes.set_yticks([i + 0.5 for i in range(len(figure.rows))], figure.rows)
    axes.tick_params(length=0, labelbottom=True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _cell(axes: Axes, mesh: Any, column: int, row: int, value: float | None) -> None:
    from matplotlib.patches import Rectangle

    text, colour, size, box = "–", "#333333", 12, None
    if value is None:
        look = {"facecolor": "#ececec", "edgecolor": "white", "linewidth": 1.5}
        axes.add_patch(Rectangle((column, row), 1, 1, hatch="////", **look))  # type: ignore[arg-type]
        box = {"boxstyle": "square,pad=0.05", "facecolor": "#ececec", "edgecolor": "none"}
    else:
        text, colour, size = f"{value:.0%}", _readable(mesh.to_rgba(value)[:3]), 9
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=size, bbox=box)


def _readable(background: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2) on sRGB ``background`` in 0..1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"
