"""Training what stays float in a packed model: here its scales and norms, towards the float model's own output."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jgptq.executor import checked_batches
from jgptq.grid import round_scales
from jgptq.tensor import QuantizedTensor
from jgptq.tracing.apply import quantized


class Tuning(NamedTuple):
    """What `tune` did: mean KL in nats a token on the batches kept back, before and after, and whether it was taken."""

    before: float
    after: float
    taken: bool


def tune(
    f: Callable,
    params: Any,
    packed: Any,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    learning_rate: float = 2e-3,
) -> tuple[Any, Tuning]:
    """Tunes the scales and norms of a packed language model to lower KL(float model || packed model).

    f: gives logits (…, vocabulary) of the next token; params: its float parameters, packed: what `quantize` made of
    them. batches: as for `quantize`; every eighth, and at least one, is kept back to judge by.
    Trained are the scales of every QuantizedTensor, each by a factor, and the float leaves of at most one axis (norms
    and biases) by shares of their root mean square, so that leaves of zeros stay zero. Codes and zeros stay, and scales
    are rounded to their dtype again, so the format is the same. One batch a step, Adam with a learning rate (of the
    relative change) that falls to zero on a cosine.

    Returns the parameters with the lower KL on the batches kept back, and both figures.
    """
    batches = checked_batches(batches)
    if len(batches) < 2:
        raise ValueError("tune needs at least two batches, one of them to judge by; cut the calibration data in more")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}; give a positive integer")
    held_out, trained = batches[::8], [batch for number, batch in enumerate(batches) if number % 8]
    serve = quantized(f)

    def divergence(changes, packed, reference, inputs):
        logits = serve(_changed(packed, changes), *inputs).astype(jnp.float32)
        ours, theirs = (jax.nn.log_softmax(values, axis=-1) for values in (logits, reference.astype(jnp.float32)))
        return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(changes, state, packed, reference, inputs):
        gradients = jax.grad(divergence)(changes, packed, reference, inputs)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(changes, updates), state

    reference = jax.jit(f)
    judge = jax.jit(divergence)

    def kl(changes):
        return sum(float(judge(changes, packed, reference(params, *inputs), inputs)) for inputs in held_out) / len(
            held_out
        )

    start = changes = _no_changes(packed)
    if not changes:
        raise ValueError("packed holds no QuantizedTensor and no norm to tune; give what jgptq.quantize returned")
    state = optimizer.init(changes)
    for number in range(steps):
        inputs = trained[number % len(trained)]
        changes, state = step(changes, state, packed, reference(params, *inputs), inputs)
    before, after = kl(start), kl(changes)
    taken = after < before  # NaN is not
    return (_stored(packed, changes) if taken else packed), Tuning(before, after, taken)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _no_changes(packed: Any) -> dict[int, jax.Array]:
    """A relative change of zero for each leaf that is trained, by its number."""
    changes = {}
    for number, leaf in enumerate(jax.tree.leaves(packed, is_leaf=_is_packed)):
        if _is_packed(leaf):
            changes[number] = jnp.zeros(leaf.scales.shape, jnp.float32)
        elif hasattr(leaf, "ndim") and leaf.ndim <= 1 and jnp.issubdtype(leaf.dtype, jnp.floating):
            changes[number] = jnp.zeros(leaf.shape, jnp.float32)
    return changes


def _changed(packed: Any, changes: dict[int, jax.Array]) -> Any:
    """Scales and norms with their changes. Scales are rounded as they will be stored, but not for the gradient."""
    leaves, tree = jax.tree.flatten(packed, is_leaf=_is_packed)
    for number, change in changes.items():
        leaf = leaves[number]
        if _is_packed(leaf):
            scales = leaf.scales.astype(jnp.float32) * (1 + change)
            rounded = round_scales(jax.lax.stop_gradient(scales), leaf.scales.dtype.name)
            scales = scales + jax.lax.stop_gradient(rounded - scales)
            leaves[number] = dataclasses.replace(leaf, scales=scales)
        else:
            size = jnp.sqrt(jnp.mean(leaf.astype(jnp.float32) ** 2))
            leaves[number] = (leaf.astype(jnp.float32) + size * change).astype(leaf.dtype)
    return jax.tree.unflatten(tree, leaves)


def _stored(packed: Any, changes: dict[int, jax.Array]) -> Any:
    """The changed parameters in the dtypes of the packed ones."""
    return jax.tree.map(
        lambda new, old: (
            dataclasses.replace(new, scales=new.scales.astype(old.scales.dtype)) if _is_packed(new) else new
        ),
        jax.jit(_changed)(packed, changes),
        packed,
        is_leaf=_is_packed,
    )
