"""What was quantized and what it cost, as tables for a terminal and as JSON."""

import dataclasses
import json
from typing import Any

import numpy as np
from rich.table import Table

from jgptq.quantize import Report
from jgptq.tensor import QuantizedTensor
from jgptq.tracing.graph import leaf_paths


def report_json(report: Report) -> str:
    """The whole report as JSON: rows, skipped leaves with their reasons, seconds, distinct programs."""
    return json.dumps(dataclasses.asdict(report), indent=1)


def report_table(report: Report) -> Table:
    """A row for each quantized weight, in order of solving."""
    table = Table(title=f"{len(report.rows)} weights quantized in {report.seconds:.1f} s")
    _add_columns(table, ("weight", "shape", "bits", "group", "loss", "rel. error", "seconds"))
    for row in report.rows:
        table.add_row(
            row.path,
            shape_text(row.shape),
            str(row.bits),
            str(row.group_size),
            f"{row.loss:.4g}",
            f"{row.relative_error:.2e}",
            f"{row.seconds:.2f}",
        )
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
            path,
            shape_text(leaf.shape),
            str(leaf.bits) if packed else np.dtype(leaf.dtype).name,
            str(leaf.group_size) if packed else "",
            f"{leaf.nbytes:,}",
            f"{errors[path]:.2e}" if path in errors else "",
        )
    table.add_section()
    table.add_row("total", "", "", "", f"{total:,}", "")
    return table


def _add_columns(table: Table, names: tuple[str, ...]) -> None:
    """The first column is a path, folded rather than cut where it does not fit."""
    table.add_column(names[0], overflow="fold")
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def nbytes(params: Any) -> int:
    """Bytes of a parameter tree, packed leaves in their packed form."""
    return sum(leaf.nbytes for _, leaf in leaf_paths(params))
