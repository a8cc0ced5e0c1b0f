"""Calibration batches on their way through a graph, segment by segment."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.partition import from_host, replicated, to_host
from jgptq.phases import UNMEASURED, Phases
from jgptq.tensor import Index
from jgptq.tracing.gradients import Loss, squared_gradients
from jgptq.tracing.graph import Graph, Read
from jgptq.tracing.segments import run, run_both, segment


class Stream:
    """Batches of one shape, and their values at the equation reached.

    read_part: gives the present values of part of a leaf. on_host: values wait in the host's memory between segments.
    read_float: gives the values of part of a leaf in the float model. With it every batch runs twice, and
    `float_values` has what the float model makes of it, but for its choices (see `segments.run_both`).
    """

    def __init__(
        self,
        graph: Graph,
        batches: list,
        read_part: Callable[[int, Index], Any],
        programs: dict,
        *,
        keep_outputs: bool,
        on_host: bool,
        read_float: Callable[[int, Index], Any] | None = None,
        phases: Phases = UNMEASURED,
    ):
        self.graph = graph
        self.position = 0
        self._read_part = read_part
        self._read_float = read_float
        self._programs = programs
        self._on_host = on_host
        self._phases = phases
        self.batches = len(batches)
        self._input_tree = jax.tree.structure(batches[0])
        self._batch_values = [dict(zip(graph.inputs, jax.tree.leaves(batch), strict=True)) for batch in batches]
        self._float_values = [dict(values) for values in self._batch_values] if read_float else []
        self._last_use = dict(graph.last_use)
        if keep_outputs:
            end = len(graph.equations)
            self._last_use.update((atom, end) for atom in graph.outputs if isinstance(atom, jex.Var))

    def advance(self, position: int) -> None:
        """Runs the equations up to `position` for every batch and drops the values nothing later uses."""
        if position == self.position:
            return
        with self._phases("advance"):
            self._advance(position)
            self._phases.wait([list(values.values()) for values in (*self._batch_values, *self._float_values)])

    def _advance(self, position: int) -> None:
        live = {var for var, last in self._last_use.items() if last >= position}
        part = segment(self.graph, self.position, position, live)
        program = self._programs.setdefault(part.program, part.program)
        common = {var: self._common(var, self._read_part) for var in part.inputs if self._is_common(var)}
        if not self._read_float:
            for values in self._batch_values:
                self._keep(values, part.outputs, run(program, _arguments(part.inputs, common, values)), live)
        else:
            common_float = {var: self._common(var, self._read_float) for var in common}
            for values, float_values in zip(self._batch_values, self._float_values, strict=True):
                arguments = _arguments(part.inputs, common, values)
                arguments_float = _arguments(part.inputs, common_float, float_values)
                if program.chooses:
                    results, results_float = run_both(program, arguments, arguments_float)
                else:
                    results, results_float = run(program, arguments), run(program, arguments_float)
                self._keep(values, part.outputs, results, live)
                self._keep(float_values, part.outputs, results_float, live)
        self.position = position

    def squared_gradients(
        self, reads: Sequence[Read], loss: Loss, read_part: Callable[[int, Index], Any]
    ) -> Iterator[list[np.ndarray]]:
        """For each batch, the squared gradients of a loss in the results of products; before any equation has run."""
        common, squares = squared_gradients(self.graph, reads, loss, self._input_tree)
        values = [self._common(var, read_part) for var in common]
        for batch in self._batch_values:
            yield jax.device_get(replicated(squares(values, [batch[var] for var in self.graph.inputs])))

    def _keep(self, values: dict, outputs: list[jex.Var], results: list[Any], live: set[jex.Var]) -> None:
        values.update(zip(outputs, map(_to_host, results) if self._on_host else results, strict=True))
        for var in [var for var in values if var not in live]:
            del values[var]

    def parts_before(self, position: int) -> set[tuple[int, Index]]:
        """The parts of leaves that equations from here to `position` read."""
        equations = self.graph.equations[self.position : position]
        return {self.graph.parts[atom] for equation in equations for atom in equation.invars if self._is_part(atom)}

    def _is_part(self, atom: Any) -> bool:
        return isinstance(atom, jex.Var) and atom in self.graph.parts

    def snapshot(self) -> Any:
        """What `restore` takes to come back here."""
        return self.position, *([dict(values) for values in each] for each in (self._batch_values, self._float_values))

    def restore(self, snapshot: Any) -> None:
        self.position, self._batch_values, self._float_values = snapshot

    def has_passed(self, leaf: int, index: Index) -> bool:
        """Whether nothing from here on reads anything of part of a leaf."""
        return all(
            self._last_use.get(var, -1) < self.position
            for var, (other, theirs) in self.graph.parts.items()
            if other == leaf and all(a[0] < b[1] and b[0] < a[1] for a, b in zip(index, theirs, strict=True))
        )

    def outputs(self) -> list[Any]:
        """Runs to the end: the function's outputs for each batch, in its own tree; needs keep_outputs."""
        self.advance(len(self.graph.equations))
        columns = [self.values(atom) for atom in self.graph.outputs]
        return [jax.tree.unflatten(self.graph.output_tree, row) for row in zip(*columns, strict=True)]

    def values(self, atom: Any) -> list[Any]:
        """A variable's value for each batch."""
        return self._each(atom, self._read_part, self._batch_values)

    def float_values(self, atom: Any) -> list[Any]:
        """A variable's value for each batch in the float model."""
        return self._each(atom, self._read_float, self._float_values)

    def _each(self, atom: Any, read: Callable[[int, Index], Any], batches: list[dict]) -> list[Any]:
        if isinstance(atom, jex.Literal):
            return [jnp.asarray(atom.val, atom.aval.dtype)] * len(batches)
        if self._is_common(atom):
            return [self._common(atom, read)] * len(batches)
        return [from_host(values[atom]) for values in batches]

    def _is_common(self, var: jex.Var) -> bool:
        return var in self.graph.parts or var in self.graph.constants

    def _common(self, var: jex.Var, read: Callable[[int, Index], Any]) -> Any:
        if var in self.graph.parts:
            return read(*self.graph.parts[var])
        return self.graph.constants[var]


def _arguments(inputs: list[jex.Var], common: dict, values: dict) -> list[Any]:
    return [common[var] if var in common else from_host(values[var]) for var in inputs]


def _to_host(array: jax.Array) -> Any:
    return array if jnp.issubdtype(array.dtype, jax.dtypes.extended) else to_host(array)
