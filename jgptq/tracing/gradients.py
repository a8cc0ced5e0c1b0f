"""How much a loss minds an error in each product's result, token by token: the square of its gradient there.

A zero is added to the result of each product, and the loss is differentiated by it. To second order, with gradients of
different tokens and outputs taken as independent, an error δ in the results then costs Σ g² δ² / 2, the Fisher
information's estimate. [Hassibi and Stork 1992; the empirical Fisher in the place of the Hessian of the loss]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jgptq.tracing.graph import Graph, Read
from jgptq.tracing.jaxprs import close

Loss = Callable[[Any, tuple], Any]


def squared_gradients(
    graph: Graph, reads: Sequence[Read], loss: Loss, input_tree: Any
) -> tuple[list[jex.Var], Callable[[list, list], list[jax.Array]]]:
    """The parts of leaves and constants that the graph reads, and a compiled function of these and a batch's leaves.

    It gives, for each read, the sum of squared gradients over its product's outputs for each token, (tokens,), or
    over tokens as well, (), where the product is not one of rows of tokens with one weight.
    The reads' results must be known. The whole graph is differentiated, so all its activations are in memory.
    """
    results = list(dict.fromkeys(read.result for read in reads))
    moves = {result: jex.Var(result.aval) for result in results}
    equations: list[jex.JaxprEqn] = []
    for equation in graph.equations:
        moved = [var for var in equation.outvars if var in moves]
        before = {var: jex.Var(var.aval) for var in moved}
        equations.append(equation.replace(outvars=[before.get(var, var) for var in equation.outvars]))
        equations += [_add(before[var], moves[var], var) for var in moved]
    needed = {atom for equation in equations for atom in equation.invars if isinstance(atom, jex.Var)}
    needed.update(atom for atom in graph.outputs if isinstance(atom, jex.Var))
    common = [var for var in (*graph.parts, *graph.constants) if var in needed]
    program = jex.jaxpr_as_fun(close([*common, *graph.inputs, *moves.values()], graph.outputs, equations))

    @jax.jit
    def squares(common: list, inputs: list) -> list[jax.Array]:
        def moved_loss(added: list) -> jax.Array:
            outputs = jax.tree.unflatten(graph.output_tree, program(*common, *inputs, *added))
            value = loss(outputs, jax.tree.unflatten(input_tree, inputs))
            if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise ValueError(
                    f"loss(outputs, inputs) gave {jnp.result_type(value)} of shape {jnp.shape(value)}; "
                    "give a function whose result is one floating-point number"
                )
            return value

        zeros = [jnp.zeros(result.aval.shape, result.aval.dtype) for result in results]
        by_result = dict(zip(results, jax.grad(moved_loss)(zeros), strict=True))
        return [_reduced(read, by_result[read.result]) for read in reads]

    return common, squares


def _add(left: jex.Var, right: jex.Var, out: jex.Var) -> jex.JaxprEqn:
    shape = jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype)
    (equation,) = jax.make_jaxpr(lax.add)(shape, shape).jaxpr.eqns
    return equation.replace(invars=[left, right], outvars=[out])


def _reduced(read: Read, gradient: jax.Array) -> jax.Array:
    squares = gradient.astype(jnp.float32) ** 2
    return jnp.sum(squares) if read.outputs is None else jnp.sum(read.outputs.rows(squares), axis=1)


def normalized(sums: dict[Any, list[np.ndarray]]) -> dict[Any, list[np.ndarray]]:
    """Weights of tokens in proportion to these, and 1 on average over all; none if all are zero."""
    every = [each for batches in sums.values() for each in batches]
    mean = sum(float(np.sum(each, dtype=np.float64)) for each in every) / max(sum(each.size for each in every), 1)
    if not math.isfinite(mean):
        raise ValueError("the gradients of the loss contain NaN or infinity; check the loss and the calibration inputs")
    return {key: [each / np.float32(mean) for each in batches] for key, batches in sums.items()} if mean else {}
