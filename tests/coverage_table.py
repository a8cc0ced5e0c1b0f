"""Writes docs/coverage.md: what `find_weights` says of every small case, and of every Flax port of transformers.

    python tests/coverage_table.py

writes the section that the environment can: the ports where transformers has its Flax classes (version 4.57), the small
cases elsewhere. The tests of both sections fail when their section is out of date.
"""

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
DOCUMENT = TESTS.parent / "docs" / "coverage.md"
INTRODUCTION = """\
# What is quantized

Each line is a function or a model that the tests quantize with GPTQ and serve, comparing with a dense forward on the
dequantized weights. *Weights* are float leaves of two and more axes; biases, norms and gains stay as they are. A weight
that is left has the reason that `find_weights` gives. Written by `python tests/coverage_table.py`.
"""
# Stacks of these have two axes.
BIASES = {"b", "bias", "bias_n"}
HEADINGS = ("Small cases", "Flax models of transformers 4.57")


def cases_section() -> str:
    import jax
    from cases import CASES

    import jgptq

    rows: dict[tuple, list[str]] = {}
    for case in CASES:
        f, params, _ = case.build()
        sites = jgptq.find_weights(f, params, *jax.eval_shape(case.held_out))
        rows.setdefault((case.name, *counts(sites)), []).append(case.framework)
    lines = [(name, ", ".join(frameworks), *rest) for (name, *rest), frameworks in rows.items()]
    return section(HEADINGS[0], ("case", "as", "weights", "quantized", "left"), lines)


def ports_section() -> str:
    from ports import PORTS, as_with_their_jax

    import jgptq

    lines = []
    for name, port in PORTS.items():
        with as_with_their_jax():
            f, params = port.build()
            sites = jgptq.find_weights(f, params, *port.batch(0))
        lines.append((f"{name} (`Flax{port.model}`)", *counts(sites)))
    return section(HEADINGS[1], ("model", "weights", "quantized", "left"), lines)


def counts(sites: Iterable[Any]) -> tuple[int, int, str]:
    """How many weights there are and are quantized, and the others by reason, named by the ends of their paths."""
    weights = [
        site for site in sites if site.quantizable or (len(site.shape) > 1 and site.path.split(".")[-1] not in BIASES)
    ]
    left: dict[str, dict[str, None]] = {}
    for site in weights:
        if not site.quantizable:
            name = ".".join(site.path.split(".")[-2:]).removeprefix("params.")
            left.setdefault(short(site.reason), {})[f"`{name}`"] = None
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in left.items())
    return len(weights), sum(site.quantizable for site in weights), reasons


def short(reason: str) -> str:
    """A reason without what the column's heading says, and without sizes."""
    reason = re.sub(r"^product of \d+ inputs and \d+ outputs; ", "", reason)
    return re.sub(r"^no product that could be quantized \((.*)\)$", r"\1", reason)


def section(heading: str, columns: tuple[str, ...], lines: Iterable[tuple]) -> str:
    rows = [columns, tuple("---" for _ in columns), *lines]
    return f"## {heading}\n\n" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def sections() -> dict[str, str]:
    """The document's sections by heading."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    parts = [f"## {part}".rstrip() + "\n" for part in text.split("\n## ")[1:]]
    return {part.partition("\n")[0].removeprefix("## "): part for part in parts}


def main() -> None:
    has_ports = importlib.util.find_spec("transformers.models.gpt2.modeling_flax_gpt2") is not None
    sys.path.append(str(TESTS / ("flax_ports" if has_ports else "coverage")))
    made = ports_section() if has_ports else cases_section()
    parts = sections() | {HEADINGS[has_ports]: made}
    DOCUMENT.write_text("\n".join([INTRODUCTION, *(parts[heading] for heading in HEADINGS if heading in parts)]))


if __name__ == "__main__":
    main()
