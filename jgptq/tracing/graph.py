"""A function traced to a flat list of equations, and what it does with each of its parameters."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.kernels.prepack import Prepacked
from jgptq.tensor import Index, Layout, QuantizedTensor, join_layouts
from jgptq.tracing.flatten import Flattener, Use
from jgptq.tracing.jaxprs import Atom
from jgptq.tracing.products import Product
from jgptq.tracing.residual import Added, Outputs, Sums, outputs_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """One product with a weight: what it reads besides, and the position at which that is known.

    added: what the function adds to the product's result, of all that is known at that position: a residual stream.
    result: the product's result, where that is one variable; outputs: how to see it as (tokens, out), if it can be.
    """

    product: Product
    activations: tuple[Atom, ...]
    position: int
    added: tuple[Added, ...] = ()
    result: jex.Var | None = None
    outputs: Outputs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a leaf that is solved by itself: all of it, a layer of a stack, or a slice of outputs.

    index: start and stop along each axis of the leaf. layout: of the part. reads: its products; their Hessians add.
    start: the position from which on the graph may run only with the part's quantized values.
    """

    leaf: int
    index: Index
    layout: Layout
    reads: tuple[Read, ...]
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One parameter leaf as seen by the function.

    path: the leaf's keys joined by dots. quantizable: everything it is used for is a product that reads it as a
    weight. tied: it has such products and other uses as well, and is quantized only if asked for.
    reason: what it is used for, and if not quantizable, why not. layout: how the leaf maps to (batch…, in, out).
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    quantizable: bool
    tied: bool
    reason: str
    layout: Layout | None = None
    leaf: int = dataclasses.field(repr=False)
    parts: tuple[Part, ...] = dataclasses.field(default=(), repr=False)

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "scalar"
        return f"{self.path}  {shape} {np.dtype(self.dtype).name}  {self.reason}"

    def name(self, part: Part) -> str:
        """The path of a part, written as in NumPy: `layers.kernel[3]`, `qkv[:, 0:64]`."""
        ranges = []
        for axis, ((start, stop), size) in enumerate(zip(part.index, self.shape, strict=True)):
            if (start, stop) != (0, size):
                ranges += [":"] * (axis - len(ranges))
                ranges.append(str(start) if stop - start == 1 else f"{start}:{stop}")
        return self.path + (f"[{', '.join(ranges)}]" if ranges else "")


class Sites(list[Site]):
    """Sites that print as a table."""

    def __str__(self) -> str:
        rows = [("", "weight", "shape", "dtype", "what it is used for")]
        for site in self:
            mark = "yes" if site.quantizable else "tied" if site.tied else "no"
            shape = "×".join(map(str, site.shape)) or "scalar"
            rows.append((mark, site.path, shape, np.dtype(site.dtype).name, site.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join((*map(str.ljust, row, widths), row[4])) for row in rows]
        count = sum(site.quantizable for site in self)
        return "\n".join([*lines, f"{count} of {len(self)} floating-point leaves can be quantized"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Parts solved on one Hessian: those that read the same activations in the same way."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        return min(part.start for part in self.parts)

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.parts[0].reads


@dataclasses.dataclass(frozen=True)
class Graph:
    """A traced function: equations in order, over variables defined once.

    parts: variables that stand for part of a leaf. last_use: the last equation that reads a variable.
    """

    equations: list[jex.JaxprEqn]
    inputs: list[jex.Var]
    outputs: list[Atom]
    output_tree: Any
    constants: dict[jex.Var, Any]
    parts: dict[jex.Var, tuple[int, Index]]
    last_use: dict[jex.Var, int]
    sites: Sites

    def steps(self, leaves: Iterable[int]) -> list[Step]:
        """The parts of these leaves by the activations they read, in order of first use."""
        chosen = set(leaves)
        parts = [part for site in self.sites if site.leaf in chosen for part in site.parts]
        groups: dict[Any, list[Part]] = defaultdict(list)
        for part in sorted(parts, key=lambda part: part.start):
            groups[tuple((read.product, read.activations) for read in part.reads)].append(part)
        return sorted((Step(parts=tuple(group)) for group in groups.values()), key=lambda step: step.start)


def leaf_paths(params: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, keys joined by dots; a QuantizedTensor counts as one leaf."""
    flat, _ = jax.tree.flatten_with_path(params, is_leaf=is_quantized)
    return [(jax.tree_util.keystr(path, simple=True, separator=".") or "params", leaf) for path, leaf in flat]


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor | Prepacked)


def is_static(leaf: Any) -> bool:
    """Whether a leaf is no array: a number, or a function in an Equinox module, say. It is taken as it is."""
    return not (hasattr(leaf, "dtype") or is_quantized(leaf))


def trace(f: Callable, params: Any, *inputs: Any) -> Graph:
    """Traces f(params, *inputs); parameter leaves may be anything with a shape and a dtype, and all else is static."""
    if not callable(f):
        raise TypeError(f"f is a {type(f).__name__}; give a function f(params, *inputs)")
    named = leaf_paths(params)
    for path, leaf in named:
        if is_quantized(leaf):
            raise ValueError(f"{path} is already a {type(leaf).__name__}; give float parameters (dequantize it first)")
    leaves, tree = jax.tree.flatten(params)
    arrays = [number for number, leaf in enumerate(leaves) if not is_static(leaf)]

    def on_arrays(values, *inputs):
        full = list(leaves)
        for number, value in zip(arrays, values, strict=True):
            full[number] = value
        return f(jax.tree.unflatten(tree, full), *inputs)

    abstract = [as_abstract(leaves[number]) for number in arrays]
    closed, output = jax.make_jaxpr(on_arrays, return_shape=True)(abstract, *inputs)
    flat = Flattener()
    avals = [var.aval for var in closed.jaxpr.invars]
    symbols = [flat.leaf(number, aval) for number, aval in zip(arrays, avals, strict=False)]
    variables = [flat.input(aval) for aval in avals[len(arrays) :]]
    results = flat.run(closed.jaxpr, closed.consts, [*symbols, *variables])
    outputs = [flat.output(result) for result in results]
    equations = _spread_late(_without_dead(flat.equations, outputs), flat.uses)
    last_use = {
        atom: position
        for position, equation in enumerate(equations)
        for atom in equation.invars
        if isinstance(atom, jex.Var)
    }
    made = {var: position for position, equation in enumerate(equations) for var in equation.outvars}
    for use in flat.uses:  # activations that a scan gives out are read by no equation
        for atom in use.activations:
            if atom in made:
                last_use[atom] = max(last_use.get(atom, 0), made[atom] + 1)
    return Graph(
        equations=equations,
        inputs=variables,
        outputs=outputs,
        output_tree=jax.tree.structure(output),
        constants=flat.constants,
        parts=flat.parts,
        last_use=last_use,
        sites=_find_sites(named, _placed(flat, made), made, Sums(equations, made, {*flat.parts, *flat.constants})),
    )


def find_weights(f: Callable, params: Any, *inputs: Any) -> Sites:
    """Every floating-point leaf of the parameters of f(params, *inputs): what would be quantized, what not, and why.

    Nothing is computed: params and inputs may be jax.ShapeDtypeStruct. The list prints as a table.
    A Flax NNX module takes the place of f and params: find_weights(module, *inputs).
    """
    return trace(f, params, *inputs).sites


def as_abstract(leaf: Any) -> Any:
    """A leaf's shape and dtype, without its bytes."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        # A weakly typed leaf takes the dtype of what it meets: it must do so here as well.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
    return leaf


def _without_dead(equations: list[jex.JaxprEqn], outputs: list[Atom]) -> list[jex.JaxprEqn]:
    """Drops equations that no output needs; those with effects stay."""
    needed = {atom for atom in outputs if isinstance(atom, jex.Var)}
    kept = []
    for equation in reversed(equations):
        if equation.effects or any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, jex.Var))
    return kept[::-1]


def _spread_late(equations: list[jex.JaxprEqn], uses: Iterable[Use]) -> list[jex.JaxprEqn]:
    """Broadcasts are made again for each equation that reads them after the first.

    An attention's mask, spread over heads and sequences once for all layers, would wait for all of them: 17 GB for a
    model of 32 heads on 128 sequences of 2048 tokens. What a product reads besides its weight stays as it is.
    """
    kept = {atom for use in uses for atom in use.activations}
    spread: dict[jex.Var, jex.JaxprEqn] = {}
    read: set[jex.Var] = set()
    result = []
    for equation in equations:
        for place, atom in enumerate(equation.invars):
            if not isinstance(atom, jex.Var) or atom not in spread:
                continue
            if atom in read:
                again = spread[atom].replace(outvars=[jex.Var(atom.aval)])
                result.append(again)
                equation = equation.replace(
                    invars=[*equation.invars[:place], *again.outvars, *equation.invars[place + 1 :]]
                )
            read.add(atom)
        if equation.primitive.name == "broadcast_in_dim" and equation.outvars[0] not in kept:
            spread[equation.outvars[0]] = equation
        result.append(equation)
    return result


def _placed(flat: Flattener, made: dict[jex.Var, int]) -> list[Use]:
    """The uses, those of a whole leaf as it is by the first equation after them that is not dead."""
    uses = []
    for use in flat.uses:
        if use.first is None and use.place is not None:
            after = (var for equation in flat.equations[use.place :] for var in equation.outvars)
            use = dataclasses.replace(use, first=next((var for var in after if var in made), None))
        uses.append(use)
    return uses


def _find_sites(named: list[tuple[str, Any]], uses: list[Use], made: dict[jex.Var, int], sums: Sums) -> Sites:
    """made: the equation that makes each variable. Of the uses, those in dead equations are none."""
    end = len(sums.equations)
    by_leaf: dict[int, list[tuple[int, Use]]] = defaultdict(list)
    for use in uses:
        if use.first is None or use.first in made:
            by_leaf[use.leaf].append((made.get(use.first, end), use))

    sites = Sites()
    for leaf, (path, array) in enumerate(named):
        if is_static(array) or not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        dtype, shape = jnp.dtype(array.dtype), tuple(array.shape)
        found = by_leaf[leaf]
        products = [(start, use) for start, use in found if use.product is not None]
        others = [(start, use.kind) for start, use in found if use.product is None]
        layout, parts, reason = _parts(leaf, shape, products, others, made, sums)
        tied = layout is not None and bool(others)
        sites.append(
            Site(
                path=path,
                shape=shape,
                dtype=dtype,
                quantizable=layout is not None and not others,
                tied=tied,
                reason=reason,
                layout=layout,
                leaf=leaf,
                parts=parts,
            )
        )
    return sites


def _parts(
    leaf: int,
    shape: tuple[int, ...],
    products: Sequence[tuple[int, Use]],
    others: Sequence[tuple[int, str]],
    made: dict[jex.Var, int],
    sums: Sums,
) -> tuple[Layout | None, tuple[Part, ...], str]:
    """The leaf's layout and parts, if products cover it; and the reason in words."""
    elsewhere = ", ".join(dict.fromkeys(kind for _, kind in others))
    if 0 in shape:
        return None, (), "it has no elements"
    if not products:
        return None, (), f"no product that could be quantized (used in {elsewhere})" if others else "not used"
    by_index: dict[Index, list[tuple[int, Use]]] = defaultdict(list)
    for start, use in products:
        by_index[use.index].append((start, use))
    if any(len({_roles(use.layout) for _, use in group}) > 1 for group in by_index.values()):
        return None, (), f"used in {len(products)} products, in different roles"
    layouts = {index: group[0][1].layout for index, group in by_index.items()}
    layout = join_layouts(shape, layouts)
    if layout is None:
        reason = "used through slices that overlap, leave some of it out, or cut its inputs unequally"
        return None, (), reason + (f"; also used in {elsewhere}" if elsewhere else "")
    earliest = [start for start, _ in others]  # a leaf with other uses must be quantized before the first of them
    parts = tuple(
        Part(
            leaf=leaf,
            index=index,
            layout=layouts[index],
            reads=_reads(group, made, sums),
            start=min([*earliest, *(start for start, _ in group)]),
        )
        for index, group in by_index.items()
    )
    return layout, parts, _reason(layout, parts, elsewhere)


def _reads(group: Sequence[tuple[int, Use]], made: dict[jex.Var, int], sums: Sums) -> tuple[Read, ...]:
    """The products of a part; the same product on the same activations, read twice, is one."""
    reads: dict[Any, Read] = {}
    for start, use in sorted(group, key=lambda item: item[0]):
        known = max([start, *(made[atom] + 1 for atom in use.activations if atom in made)])
        added, outputs = (), None
        if use.result is not None:
            product = use.result, use.product, use.side, use.layout.out_features
            added, outputs = sums.added(*product, known), outputs_of(*product)
        read = Read(
            product=use.product,
            activations=use.activations,
            position=known,
            added=added,
            result=use.result if use.result in made else None,
            outputs=outputs,
        )
        key = use.product, use.activations
        reads[key] = dataclasses.replace(reads[key], result=None) if key in reads else read
    return tuple(reads.values())


def _roles(layout: Layout) -> Any:
    return layout.shape, layout.roles()


def _reason(layout: Layout, parts: tuple[Part, ...], elsewhere: str) -> str:
    reason = f"product of {layout.in_features} inputs and {layout.out_features} outputs"
    batch = layout.sizes(layout.batch_axes)
    if batch:
        reason = (
            f"{'×'.join(map(str, batch))} products of {layout.in_features} inputs and {layout.out_features} outputs"
        )
    reads = max(len(part.reads) for part in parts)
    if reads > 1:
        reason += f", shared by {reads} calls"
    if elsewhere:
        reason += f"; also used in {elsewhere}, so left alone unless Options(tied=True)"
    return reason
