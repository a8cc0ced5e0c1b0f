"""A report as JSON and back, and its totals."""

import dataclasses
import json
import math
import types
import typing
from typing import Any

from jgptq.quantize import Report


def totals(report: Report) -> dict[str, int | float]:
    """Sums over all weights. bits_per_weight counts scales and zeros; seconds are those of the whole call."""
    parameters = sum(math.prod(row.shape) for row in report.rows)
    nbytes = sum(row.nbytes for row in report.rows)
    return {
        "weights": len(report.rows),
        "parameters": parameters,
        "nbytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters if parameters else math.nan,
        "loss": math.fsum(row.loss for row in report.rows),
        "seconds": report.seconds,
    }


def report_json(report: Report) -> str:
    """The whole report and its totals as JSON. A number that is not finite becomes null, for JSON has none such."""
    return json.dumps(_finite(dataclasses.asdict(report) | {"totals": totals(report)}), indent=1, allow_nan=False)


def read_report(text: str) -> Report:
    """The report that `report_json` wrote; null becomes NaN. A text that is no report is a ValueError."""
    try:
        return _read(json.loads(text), Report, "the text")
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a report of jgptq: {error}; give the JSON text that report_json wrote") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any, kind: Any, where: str) -> Any:
    """`value`, as JSON gave it, as the annotated `kind`; fields that a dataclass does not know are ignored."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields = dataclasses.fields(kind)
        known = [field for field in fields if field.name in value]
        if missing := [field.name for field in fields if field not in known and field.default is dataclasses.MISSING]:
            raise ValueError(f"{where} has no {missing[0]!r}")
        return kind(**{field.name: _read(value[field.name], field.type, f"{where}.{field.name}") for field in known})
    if isinstance(kind, types.GenericAlias) and isinstance(value, list):
        items = typing.get_args(kind)
        if items[-1] is ...:
            items = items[:1] * len(value)
        if len(items) == len(value):
            return tuple(_read(value[i], items[i], f"{where}[{i}]") for i in range(len(value)))
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind and kind in (int, str, bool) and not (kind is int and not 0 <= value < 2**63):
        return value
    raise ValueError(f"{where} is {json.dumps(value)[:40]} and not {_EXPECTED.get(kind, _expected(kind))}")


_EXPECTED = {float: "a number", int: "a whole number from 0", str: "a string", bool: "true or false"}


def _expected(kind: Any) -> str:
    return "an object" if dataclasses.is_dataclass(kind) else f"a list for {kind}"
