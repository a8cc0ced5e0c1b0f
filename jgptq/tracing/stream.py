"""Calibration batches on their way through a graph, segment by segment."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jgptq.tracing.graph import Graph, Site
from jgptq.tracing.segments import run, segment


class Stream:
    """Batches of one shape, and their values at the equation reached."""

    def __init__(self, graph: Graph, batches: list, leaves: list, programs: dict, keep_outputs: bool):
        self.graph = graph
        self.steps = _steps(graph)
        self._position = 0
        self._leaf_values = leaves  # shared with the executor, which replaces weights in it
        self._leaf_number = {var: number for number, var in enumerate(graph.leaves)}
        self._programs = programs
        self._batch_values = [dict(zip(graph.inputs, jax.tree.leaves(batch), strict=True)) for batch in batches]
        self._last_use: dict[jex.Var, int] = {}
        for position, equation in enumerate(graph.equations):
            self._last_use.update((atom, position) for atom in equation.invars if isinstance(atom, jex.Var))
        if keep_outputs:
            end = len(graph.equations)
            self._last_use.update((atom, end) for atom in graph.outputs if isinstance(atom, jex.Var))

    def advance(self, position: int) -> None:
        """Runs the equations up to `position` for every batch and drops the values nothing later uses."""
        live = {var for var, last in self._last_use.items() if last >= position}
        part = segment(self.graph, self._position, position, live)
        program = self._programs.setdefault(part.program, part.program)
        for values in self._batch_values:
            arguments = [self._read(values, var) for var in part.inputs]
            values.update(zip(part.outputs, run(program, arguments), strict=True))
            for var in [var for var in values if var not in live]:
                del values[var]
        self._position = position

    def has_passed(self, leaf: int) -> bool:
        """Whether the equations run so far include the product of a quantizable leaf."""
        return next(site for step in self.steps for site in step if site.leaf == leaf).position < self._position

    def outputs(self) -> list[Any]:
        """Runs to the end: the function's outputs for each batch, in its own tree; needs keep_outputs."""
        self.advance(len(self.graph.equations))
        columns = [self.values(atom) for atom in self.graph.outputs]
        return [jax.tree.unflatten(self.graph.output_tree, row) for row in zip(*columns, strict=True)]

    def values(self, atom: Any) -> list[Any]:
        """A variable's value for each batch."""
        if isinstance(atom, jex.Literal):
            return [jnp.asarray(atom.val, atom.aval.dtype)] * len(self._batch_values)
        return [self._read(values, atom) for values in self._batch_values]

    def _read(self, values: dict, var: jex.Var) -> Any:
        if var in self._leaf_number:
            return self._leaf_values[self._leaf_number[var]]
        return self.graph.constants[var] if var in self.graph.constants else values[var]


def _steps(graph: Graph) -> list[list[Site]]:
    """Quantizable sites grouped by the activation they read, in order of first use."""
    groups: dict[Any, list[Site]] = {}
    for site in sorted((site for site in graph.sites if site.quantizable), key=lambda site: site.position):
        groups.setdefault((site.activation, site.product), []).append(site)
    return list(groups.values())
