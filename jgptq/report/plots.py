"""Plots of a report as SVG drawings: error by depth and by kind of weight, bits, time."""

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jgptq.quantize import Row
from jgptq.report.tables import printable

Kinds = dict[str, list[Row]]

# Legible on white and on black. Lines tell apart as many kinds as there are colours; a list may be longer.
COLORS = ("#3d87d9", "#e07b39", "#3aa66f", "#d0579a", "#9a7bd8", "#b8962b", "#2fa8b5", "#d9534f")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
LISTED = 12
GRAY = "#8a8f98"
INK = "#010203"  # stands for the page's own text colour
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a path may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.alpha": 0.15,
    **dict.fromkeys(
        ("grid.color", "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


class Sign(NamedTuple):
    """A line of a legend."""

    color: str
    shape: str
    text: str


class Plot(NamedTuple):
    """svg: an <svg> element in the text colour of the page around it."""

    caption: str
    svg: str
    legend: list[Sign]


def plots(rows: Sequence[Row]) -> list[Plot]:
    """The plots for which the rows hold a number to show."""
    kinds: Kinds = {}
    for row in rows:
        kinds.setdefault(depth_and_kind(row.path)[1], []).append(row)
    methods = {row.method for row in rows}
    method = methods.pop().upper() if len(methods) == 1 else "as quantized"
    drawn = (_error_by_depth(kinds, method), _error_by_kind(kinds, method), _bits(kinds), _seconds(kinds))
    return [plot for plot in drawn if plot is not None]


def depth_and_kind(path: str) -> tuple[int | None, str]:
    """Splits "layers.3.mlp.up" into 3 and "layers.*.mlp.up", by the first integer between dots or in brackets."""
    found = re.search(r"(?:^|[.\[,])\s*([0-9]{1,9})(?=[.,\]]|$)", path)
    if found is None:
        return None, path
    return int(found[1]), f"{path[: found.start(1)]}*{path[found.end(1) :]}"


def median(values: Iterable[float]) -> float:
    """Of the finite ones; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _error_by_depth(kinds: Kinds, method: str) -> Plot | None:
    deep = {kind: found for kind, rows in kinds.items() if (found := [row for row in rows if _depth(row) is not None])}
    shown = _largest(deep, _error_size, len(COLORS))
    if len({_depth(row) for rows in shown.values() for row in rows}) < 2:
        return None
    styles = list(zip(shown.items(), COLORS, MARKERS, strict=False))

    def draw(figure):
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for side, (axes, name) in enumerate(zip(panels, (method, "RTN"), strict=True)):
            for (_, rows), color, marker in styles:
                points = sorted((_depth(row), _positive(_errors(row)[side])) for row in rows)
                every = max(1, len(rows) // 16)
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, markevery=every)
            axes.set(xlabel="depth", title=name)
        panels[0].set(ylabel="relative output error")
        panels[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _log_axis(panels[0].yaxis, [error for rows in shown.values() for row in rows for error in _errors(row)])

    legend = [Sign(color, MARKERS[marker], kind) for (kind, _), color, marker in styles]
    caption = f"Relative output error by depth, {method} beside RTN" + _how_many(shown, deep)
    return Plot(caption, _svg("depth", 3.6, draw), legend)


def _error_by_kind(kinds: Kinds, method: str) -> Plot | None:
    shown = _largest(kinds, _error_size, LISTED)
    errors = [
        [median(_positive(error) for error in column) for column in zip(*map(_errors, rows), strict=True)]
        for rows in shown.values()
    ]

    def draw(axes):
        for y, (ours, rtn) in enumerate(errors):
            axes.plot([ours, rtn], [y, y], color=GRAY, linewidth=1.5)
            axes.plot(rtn, y, "D", color=COLORS[1], markersize=6)
            axes.plot(ours, y, "o", color=COLORS[0], markersize=7)
        _log_axis(axes.xaxis, [error for pair in errors for error in pair])
        axes.set(xlabel="relative output error, median")

    legend = [Sign(COLORS[0], "●", method), Sign(COLORS[1], "◆", "RTN")]
    return _by_kind("kind", "Relative output error by kind of weight", kinds, shown, draw, legend)


def _bits(kinds: Kinds) -> Plot | None:
    def bits(rows: list[Row]) -> tuple[float, float]:
        """Bits a weight, of its codes and of all else."""
        parameters = sum(math.prod(row.shape) for row in rows)
        codes = sum(row.bits * math.prod(row.shape) for row in rows) / max(1, parameters)
        return codes, max(0.0, 8 * sum(row.nbytes for row in rows) / max(1, parameters) - codes)

    shown = _largest(kinds, lambda rows: sum(bits(rows)), LISTED)

    def draw(axes):
        for y, (codes, rest) in enumerate(map(bits, shown.values())):
            axes.barh(y, codes, height=0.35, color=COLORS[0])
            axes.barh(y, rest, height=0.35, color=COLORS[1], left=codes)
        axes.set(xlabel="bits a weight")

    legend = [Sign(COLORS[0], "■", "codes"), Sign(COLORS[1], "■", "scales, zeros and order")]
    return _by_kind("bits", "Bits by kind of weight", kinds, shown, draw, legend)


def _seconds(kinds: Kinds) -> Plot | None:
    shown = _largest(kinds, lambda rows: sum(row.seconds for row in rows), LISTED)

    def draw(axes):
        for y, rows in enumerate(shown.values()):
            axes.barh(y, sum(row.seconds for row in rows), height=0.35, color=COLORS[2])
        axes.set(xlabel="seconds, all depths together, with compiling")

    return _by_kind("seconds", "Time by kind of weight", kinds, shown, draw, [])


def _by_kind(name: str, caption: str, kinds: Kinds, shown: Kinds, draw: Callable, legend: list[Sign]) -> Plot | None:
    """A list of kinds, each named above its own row of the drawing, where a long path has room."""

    def draw_and_name(figure):
        axes = figure.add_subplot()
        draw(axes)
        for y, kind in enumerate(map(printable, shown)):
            text = kind if len(kind) <= 52 else f"{kind[:20]}…{kind[-31:]}"
            axes.text(0.01, y - 0.27, text, transform=axes.get_yaxis_transform(), fontsize=9, in_layout=False)
        axes.set(yticks=[], ylim=(len(shown) - 0.6, -0.8))

    svg = _svg(name, 1.0 + 0.42 * len(shown), draw_and_name) if shown else ""
    return Plot(caption + _how_many(shown, kinds), svg, legend) if shown else None


def _svg(name: str, height: float, draw: Callable) -> str:
    """The <svg> of what `draw` does to a figure; equal drawings are equal text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a browser has more fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(4.8, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' id="[\w.]+_[0-9]+"', "", svg)  # equal in all drawings, and nothing refers to them


def _largest(kinds: Kinds, size: Callable[[list[Row]], float], limit: int) -> Kinds:
    """The kinds of largest size, first the largest; none whose size is not a positive number."""
    sizes = {kind: _positive(size(rows)) for kind, rows in kinds.items()}
    known = [kind for kind in kinds if math.isfinite(sizes[kind])]
    return {kind: kinds[kind] for kind in sorted(known, key=sizes.__getitem__, reverse=True)[:limit]}


def _error_size(rows: list[Row]) -> float:
    return median(_positive(error) for row in rows for error in _errors(row))


def _depth(row: Row) -> int | None:
    return depth_and_kind(row.path)[0]


def _errors(row: Row) -> tuple[float, float]:
    return row.relative_error, row.rtn_error


def _positive(value: float) -> float:
    """NaN for what a logarithmic axis cannot show."""
    return value if math.isfinite(value) and value > 0 else math.nan


def _how_many(shown: Kinds, kinds: Kinds) -> str:
    return f" (the {len(shown)} largest of {len(kinds)} kinds)" if len(shown) < len(kinds) else ""


def _log_axis(axis, values: list[float]) -> None:
    """A logarithmic axis around the values, with plain numbers at a handful of ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for value in values if math.isfinite(_positive(value))]
    low, high = min(values) / 1.25, max(values) * 1.25
    decades = math.log10(high / low)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=range(1, 10) if decades < 0.6 else (1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
