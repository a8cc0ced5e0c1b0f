"""The operations of jgptq.kernels.mosaic for Pallas's GPU interpreter, which has no wgmma with weights in registers."""

import jax.numpy as jnp


def read_rows(ref):
    return ref[...]


def read_weights(codes, zeros, bits, dtype):
    k, pairs = jnp.arange(128), 16 // bits
    own = k // 8 // pairs  # of the thread's words
    words = codes[...][:, own // 4 * 16 + k % 8 // 2 * 4 + own % 4]
    shifts = (16 * (k % 2) + bits * (k // 8 % pairs)).astype(jnp.uint32)
    values = ((words >> shifts[None]) & (2**bits - 1)).astype(jnp.int32)
    lows = [zero if isinstance(zero, int) else zero[...].astype(jnp.int32)[:, None] for zero in zeros]
    return [(part - low).astype(dtype) for part, low in zip(jnp.split(values, len(zeros), 1), lows, strict=True)]


def multiply(weights, x):
    return jnp.dot(weights, x[...].T, preferred_element_type=jnp.float32)


def zeros(shape):
    return jnp.zeros(shape, jnp.float32)


def write_transposed(ref, sums):
    ref[...] = sums.T
