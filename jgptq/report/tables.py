"""A report, and any parameter tree, as tables for a terminal."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.box
from rich.table import Table
from rich.text import Text

from jgptq.estimate import Estimate
from jgptq.quantize import Report, Row
from jgptq.report.record import totals
from jgptq.tensor import QuantizedTensor
from jgptq.tracing.graph import leaf_paths

# What a table says of a weight after its path, and `cells` gives.
COLUMNS = ("shape", "bits", "group", "tokens", "loss", "rel. error", "RTN error", "damp", "seconds")


def report_table(report: Report) -> Table:
    """A row for each quantized weight, in order of solving, and the totals."""
    total = totals(report)
    table = Table(
        title=f"{total['weights']} weights quantized in {total['seconds']:.1f} s",
        caption=f"{total['parameters']:,} parameters in {total['nbytes']:,} bytes",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    names = [name for name in COLUMNS if name != "group"]  # with it, 80 columns have no room for a path
    _add_columns(table, ("weight", *names))
    for row in report.rows:
        shown = dict(zip(COLUMNS, cells(row), strict=True))
        table.add_row(_plain(row.path), *(shown[name] for name in names))
    table.add_section()
    sums = {
        "bits": number(total["bits_per_weight"], ".2f"),
        "loss": number(total["loss"], ".3g"),
        "seconds": number(total["seconds"], ".1f"),
    }
    table.add_row("total", *(sums.get(name, "") for name in names))
    return table


def weights_table(params: Any, errors: dict[str, float]) -> Table:
    """Every leaf of a parameter tree: shape, bits (a float leaf's dtype), group, bytes and, where known, error."""
    table = Table()
    _add_columns(table, ("weight", "shape", "bits", "group", "bytes", "rel. error"))
    total = 0
    for path, leaf in leaf_paths(params):
        total += leaf.nbytes
        packed = isinstance(leaf, QuantizedTensor)
        table.add_row(
            _plain(path),
            shape_text(leaf.shape),
            str(leaf.bits) if packed else np.dtype(leaf.dtype).name,
            str(leaf.group_size) if packed else "",
            f"{leaf.nbytes:,}",
            number(errors[path], ".2e") if path in errors else "",
        )
    table.add_section()
    table.add_row("total", "", "", "", f"{total:,}", "")
    return table


def profile_table(profile: Sequence[tuple[str, float]]) -> Table:
    """Seconds by phase, and their shares."""
    total = sum(seconds for _, seconds in profile)
    table = Table(title="where the time went", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    _add_columns(table, ("phase", "seconds", "share"))
    for phase, seconds in profile:
        table.add_row(phase, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %" if total else "")
    table.add_section()
    table.add_row("total", f"{total:.1f}", "")
    return table


def estimate_table(estimate: Estimate) -> Table:
    """What a quantization would take: each weight before and after, and in the caption peak and time."""
    table = Table(
        title=f"{len(estimate.weights)} weights to quantize",
        caption=f"{estimate.nbytes:,} bytes -> {estimate.packed_nbytes:,} bytes, with what stays in float",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    _add_columns(table, ("weight", "shape", "bits", "group", "bytes", "packed"))
    for weight in estimate.weights:
        sizes = (str(weight.bits), str(weight.group_size), f"{weight.nbytes:,}", f"{weight.packed_nbytes:,}")
        table.add_row(_plain(weight.path), shape_text(weight.shape), *sizes)
    return table


def estimate_lines(estimate: Estimate) -> list[str]:
    """Peak and time in words."""
    peak = ", ".join(
        f"{name} {size / 1e6:,.0f}" for name, size in estimate.peak if size >= 0.005 * estimate.peak_nbytes
    )
    phases = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in estimate.seconds if seconds)
    return [
        f"peak memory: about {estimate.peak_nbytes / 1e6:,.0f} MB, at {estimate.peak_at}, beside what libraries and "
        "compiler take (on a CPU 350 to 500 MB)",
        f"  of these MB: {peak}",
        f"time: about {_duration(estimate.total_seconds)} beside reading, compiling and writing ({phases}), from "
        f"{sum(count for _, count in estimate.flops) / 1e12:,.1f} TFLOP and {estimate.rate / 1e9:,.0f} GFLOP/s, the "
        "rate of one float32 product just now",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cells(row: Row) -> tuple[str, ...]:
    return (
        shape_text(row.shape),
        str(row.bits),
        str(row.group_size),
        f"{row.tokens:,}",
        number(row.loss, ".3g"),
        number(row.relative_error, ".2e"),
        number(row.rtn_error, ".2e"),
        number(row.damp, ".3g"),
        number(row.seconds, ".1f"),
    )


def number(value: float, form: str) -> str:
    """A dash for what is not known."""
    return "–" if math.isnan(value) else format(value, form)


def printable(text: str) -> str:
    """Control characters and lone surrogates as backslash escapes: paths are anyone's text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def nbytes(params: Any) -> int:
    """Bytes of a parameter tree, packed leaves in their packed form."""
    return sum(leaf.nbytes for _, leaf in leaf_paths(params))


def _plain(text: str) -> Text:
    """Without markup, for paths hold brackets."""
    return Text(printable(text))


def _add_columns(table: Table, names: tuple[str, ...]) -> None:
    """The first column is a path, folded rather than cut where it does not fit."""
    table.add_column(names[0], overflow="fold")
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
