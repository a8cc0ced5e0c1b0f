"""Calibration batches cut anew: where a function treats rows apart, all rows go in the largest batches that fit.

Which batches these are depends on the rows alone and not on how they were given, so neither do the bits of what is
computed from them. What cannot be shown to treat rows apart gets its batches as they are.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jgptq.tracing.costs import Costs, between, costs
from jgptq.tracing.graph import Graph, trace
from jgptq.tracing.rows import same_value, treats_rows_apart

# Bytes alive in a batch on a CPU (docs/memory.md). Larger ones leave its caches, and where an array has over 32 MB its
# memory goes back to the system after each use: 97 M parameters took 7 % less CPU time than with 64 MB.
CPU_BATCH = 32 << 20
# The same on accelerators, whatever they have: products of more gain nothing.
MOST = 8 << 30
# Rows that a function is traced at to see what it does with them, and of the second trace, which is of all rows if
# there are no more than these.
FEW, MANY = 2, 64


class Piece(NamedTuple):
    """Rows start .. stop of the batch of this number; stop None: the batch as it is."""

    batch: int
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
    """Batches of one shape: a trace of the function on one, and what of the batches given each is made of.

    has_rows: which leaves of a batch are divided; of the others each batch has those of its first piece.
    """

    graph: Graph
    pieces: list[list[Piece]]
    has_rows: tuple[bool, ...]

    def of(self, batches: Sequence[tuple]) -> list[tuple]:
        """The batches themselves."""
        leaves = [jax.tree.leaves(batch) for batch in batches]
        tree = jax.tree.structure(batches[self.pieces[0][0].batch])

        def joined(number: int, pieces: list[Piece]) -> Any:
            if not self.has_rows[number]:
                return leaves[pieces[0].batch][number]
            return _joined([_rows(leaves[piece.batch][number], piece) for piece in pieces])

        numbers = range(len(self.has_rows))
        return [jax.tree.unflatten(tree, [joined(number, pieces) for number in numbers]) for pieces in self.pieces]


def _rows(leaf: Any, piece: Piece) -> Any:
    if (piece.start, piece.stop) == (0, leaf.shape[0]):
        return leaf
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[piece.start : piece.stop]
    # Compiled once for all starts.
    return lax.dynamic_slice_in_dim(leaf, np.int32(piece.start), piece.stop - piece.start)


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return (jnp if any(isinstance(part, jax.Array) for part in parts) else np).concatenate(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that batches have. parameters: bytes of those that are there throughout.

    models: 2 where a second one is followed. on_host: whether activations wait in the host's memory.
    """

    parameters: int
    models: int = 1
    on_host: bool = False

    def of_batch(self, cost: Costs) -> int:
        """Bytes that may be alive in one batch. cost: of all rows at once."""
        limit = device_memory()
        if limit is None:
            return CPU_BATCH
        # A Hessian, its drift, a factor, and a solve, which is about as large.
        others = (
            self.parameters + 4 * cost.hessian + (0 if self.on_host else self.models * max(cost.waiting, default=0))
        )
        # Half of the rest: compilers may order equations otherwise, and memory is in pieces.
        return min(max(limit - others, 0) // 2, MOST)


def device_memory() -> int | None:
    """Bytes that JAX may have on an accelerator; None if it is a CPU or does not say."""
    device = jax.local_devices()[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def as_given(f: Callable, params: Any, batches: Sequence[tuple]) -> list[Cut]:
    """The batches as they are, those of one shape together."""
    return _as_given(f, params, dict(enumerate(batches)))


def _as_given(f: Callable, params: Any, batches: dict[int, tuple]) -> list[Cut]:
    groups = _grouped(batches, lambda leaf: np.shape(leaf))
    return [_whole(trace(f, params, *batches[numbers[0]]), numbers) for numbers in groups]


def _whole(graph: Graph, numbers: list[int]) -> Cut:
    return Cut(graph, [[Piece(number)] for number in numbers], (False,) * len(graph.inputs))


def largest(f: Callable, params: Any, batches: Sequence[tuple], room: Room) -> list[Cut]:
    """All rows in the largest batches that fit, of equal sizes if they can be, wherever f is seen to allow it.

    Leaves may be jax.ShapeDtypeStructs. f is traced at two numbers of rows, at those of the batches given and at those
    of the batches to be run; then on batches as they are if need be.
    """
    cuts: list[Cut] = []
    for numbers in _grouped(dict(enumerate(batches)), lambda leaf: (np.ndim(leaf), np.shape(leaf)[1:])):
        group = {number: batches[number] for number in numbers}
        cuts += _largest(f, params, group, room) or _as_given(f, params, group)
    return cuts


def _grouped(batches: dict[int, tuple], form: Callable[[Any], Any]) -> list[list[int]]:
    """The numbers of batches whose leaves are of one dtype and form, in order."""
    groups: dict[Any, list[int]] = {}
    for number, batch in batches.items():
        leaves, tree = jax.tree.flatten(batch)
        key = tree, tuple((form(leaf), jax.dtypes.result_type(leaf), _is_weak(leaf)) for leaf in leaves)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _is_weak(leaf: Any) -> bool:
    """Whether a leaf takes the dtype of what it meets."""
    return getattr(leaf, "weak_type", False)


def _largest(f: Callable, params: Any, batches: dict[int, tuple], room: Room) -> list[Cut] | None:
    """The cuts of batches that are alike but for numbers of rows; None if they are to stay as they are."""
    if any(map(_is_weak, jax.tree.leaves(list(batches.values())))):
        return None  # joined arrays would not be
    graph = None
    if len(batches) == 1:
        ((number, batch),) = batches.items()
        graph = trace(f, params, *batch)
        cost = costs(graph)
        if cost.most <= room.of_batch(cost):
            return [_whole(graph, [number])]
    found = (_Divided(f, params, batches, has_rows, graph).cuts(room) for has_rows in _guesses(list(batches.values())))
    return next(filter(None, found), None)


def _guesses(batches: list[tuple]) -> Iterator[tuple[bool, ...]]:
    """Which leaves may have the rows: those whose leading sizes are alike in every batch, all others being equal.

    Before each such guess comes one without those of its leaves that are equal in all batches.
    """
    columns = list(zip(*map(jax.tree.leaves, batches), strict=True))
    sizes = [tuple(leaf.shape[0] if np.ndim(leaf) else 0 for leaf in column) for column in columns]
    equal = functools.cache(lambda number: all(same_value(columns[number][0], leaf) for leaf in columns[number][1:]))
    for rows in sorted(dict.fromkeys(sizes), key=sum, reverse=True):
        guess = tuple(own == rows for own in sizes)
        if min(rows) < 1 or sum(rows) < FEW or not all(mine or equal(number) for number, mine in enumerate(guess)):
            continue
        fewer = tuple(mine and not equal(number) for number, mine in enumerate(guess))
        if any(fewer) and fewer != guess:
            yield fewer
        yield guess


class _Divided:
    """Batches whose rows are along the first axes of some of their leaves.

    whole: the trace of all rows, if there is one.
    """

    def __init__(
        self, f: Callable, params: Any, batches: dict[int, tuple], has_rows: tuple[bool, ...], whole: Graph | None
    ):
        self.f, self.params, self.has_rows = f, params, has_rows
        place = has_rows.index(True)
        self.sizes = {number: jax.tree.leaves(batch)[place].shape[0] for number, batch in batches.items()}
        self.total = sum(self.sizes.values())
        self.leaves, self.tree = jax.tree.flatten(next(iter(batches.values())))
        self._graphs = {} if whole is None else {self.total: whole}

    def graph(self, rows: int) -> Graph:
        """The function's trace on so many rows."""
        if rows not in self._graphs:
            self._graphs[rows] = self._traced(rows)
        return self._graphs[rows]

    def _traced(self, rows: int) -> Graph:
        def shaped(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), jax.dtypes.result_type(leaf))

        leaves = [shaped(leaf) if split else leaf for leaf, split in zip(self.leaves, self.has_rows, strict=True)]
        return trace(self.f, self.params, *jax.tree.unflatten(self.tree, leaves))

    def cuts(self, room: Room) -> list[Cut] | None:
        """None if the function is not seen to treat rows apart."""
        other = self.total if FEW < self.total <= MANY else FEW + 1
        if not self._treats_apart(other):
            return None
        cost = [costs(self.graph(rows)) for rows in (FEW, other)]

        def cost_of(rows: int) -> Costs:
            return between(*cost, (FEW, other), rows)

        space = room.of_batch(cost_of(self.total))
        most = bisect.bisect_right(range(1, self.total + 1), space, key=lambda rows: cost_of(rows).most)
        size = _size(max(most, 1), self.total)
        last = self.total % size
        if not all(map(self._treats_apart, {size, last or size, *self.sizes.values()} - {other})):
            return None
        pieces = self._pieces(size)
        full, rest = (pieces[:-1], pieces[-1:]) if last else (pieces, [])
        return [Cut(self.graph(rows), own, self.has_rows) for rows, own in ((size, full), (last, rest)) if own]

    def _treats_apart(self, rows: int) -> bool:
        """Whether the function does to this many rows what it does to each."""
        try:
            graphs = self.graph(FEW), self.graph(rows)
        except Exception:  # f takes no such batch; whatever is wrong with those of the caller, these will tell
            return False
        return rows == FEW or treats_rows_apart(*graphs, (FEW, rows), self.has_rows)

    def _pieces(self, size: int) -> list[list[Piece]]:
        """All rows in order, so many at a time."""
        pieces: list[list[Piece]] = [[]]
        for number, rows in self.sizes.items():
            start = 0
            while start < rows:
                room = size - sum(piece.stop - piece.start for piece in pieces[-1])
                if not room:
                    pieces.append([])
                    continue
                stop = min(rows, start + room)
                pieces[-1].append(Piece(number, start, stop))
                start = stop
        return pieces


def _size(most: int, total: int) -> int:
    """Rows in a batch, at most `most`: a divisor of all if one is over the half of that, to compile once."""
    if total <= most:
        return total
    divisors = [size for size in range(most, most // 2, -1) if total % size == 0]
    return divisors[0] if divisors else -(-total // -(-total // most))
