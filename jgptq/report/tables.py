"""A report, and any parameter tree, as tables for a terminal."""

import math
from typing import Any

import numpy as np
import rich.box
from rich.table import Table
from rich.text import Text

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
