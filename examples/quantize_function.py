"""Quantizes a bare JAX function of a parameter pytree: no model class, no names known to jgptq.

    python examples/quantize_function.py

The function is a two-layer network with an attention-like einsum, its weights random. The script shows what jgptq
finds in it, quantizes it with two rules, and compares round to nearest with GPTQ on inputs not used in calibration.
"""

import jax
import jax.numpy as jnp

import jgptq

FEATURES, HEADS, HEAD_DIM, HIDDEN, CLASSES = 64, 4, 16, 256, 10


def init(key):
    """Random parameters; kernels are scaled so that activations keep their size."""
    keys = jax.random.split(key, 5)

    def normal(key, *shape, inputs):
        return jax.random.normal(key, shape) * inputs**-0.5

    return {
        "heads": normal(keys[0], FEATURES, HEADS, HEAD_DIM, inputs=FEATURES),
        "merge": normal(keys[1], HEADS, HEAD_DIM, FEATURES, inputs=FEATURES),
        "up": {"kernel": normal(keys[2], FEATURES, HIDDEN, inputs=FEATURES), "bias": jnp.zeros(HIDDEN)},
        "down": {"kernel": normal(keys[3], HIDDEN, FEATURES, inputs=HIDDEN), "bias": jnp.zeros(FEATURES)},
        "classes": normal(keys[4], CLASSES, FEATURES, inputs=FEATURES),
    }


def network(params, x):
    """x (batch, tokens, FEATURES) to logits (batch, tokens, CLASSES)."""
    split = jnp.tanh(jnp.einsum("btf,fhd->bthd", x, params["heads"]))
    x = x + jnp.einsum("bthd,hdf->btf", split, params["merge"])
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"][None, None])
    x = x + hidden @ params["down"]["kernel"] + params["down"]["bias"][None, None]
    return x @ params["classes"].T


def inputs(key, batch=8, tokens=32):
    """Correlated features: a random walk along the feature axis. GPTQ gains most where inputs are correlated."""
    return jnp.cumsum(jax.random.normal(key, (batch, tokens, FEATURES)), axis=-1) / FEATURES**0.5


def main():
    params = init(jax.random.key(0))
    batches = [inputs(key) for key in jax.random.split(jax.random.key(1), 8)]
    unseen = inputs(jax.random.key(2))

    print("What jgptq finds in the function:")
    for site in jgptq.find_weights(network, params, unseen):
        print(f"  {'quantize' if site.quantizable else 'leave   '}  {site}")

    rules = [
        ("classes", None),  # leave the last layer as it is
        ("down.*", jgptq.Options(grid=jgptq.Grid(bits=4, group_size=64))),
    ]
    expected = network(params, unseen)
    serve = jax.jit(jgptq.quantized(network))
    for method in ("rtn", "gptq"):
        packed, report = jgptq.quantize(
            network, params, batches, grid=jgptq.Grid(bits=3, group_size=32), method=method, rules=rules
        )
        error = serve(packed, unseen) - expected
        relative = jnp.sum(error**2) / jnp.sum(expected**2)
        print(f"\n{method}: relative squared error of the outputs {relative:.5f}")
        for row in report.rows:
            print(f"  {row.path:12} {row.bits} bits, group {row.group_size}: error {row.relative_error:.5f}")
        for path, reason in report.skipped:
            print(f"  {path:12} not quantized: {reason}")


if __name__ == "__main__":
    main()
