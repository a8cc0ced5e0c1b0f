"""The Hopper kernel without a Hopper: it lowers; its values in the interpreter are those of float64.

The interpreter runs the kernel's own grid, pipeline, indices and sums; what a thread does with its registers is checked
by test_prepack.py and by benchmarks/gpu.py, on a GPU.
"""

import emulated_mosaic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prepack import make_weight

import jgptq
from jgptq.kernels import hopper

MESH = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
)


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import params  # public from JAX 0.11 on

    return params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True))


# (bits, inputs, outputs, group size, symmetric, permuted), rows
PRODUCTS = [
    ((4, 256, 130, 128, False, False), 3),
    ((4, 200, 10, None, True, True), 1),
    ((4, 160, 10, 64, False, True), 9),
    ((2, 100, 10, 24, False, False), 2),
    ((8, 72, 10, 32, False, False), 2),
    ((4, 1024, 128, 256, True, False), 5),
]


@pytest.mark.parametrize(("parts", "rows"), PRODUCTS, ids=str)
def test_values_match_float64(parts, rows):
    weight = make_weight(*parts)
    packed = jgptq.prepack(weight)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, weight.in_features)), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(MESH), interpreter():
        y = jax.jit(lambda x, w: hopper.matmul(x, w, jnp.float32, operations=emulated_mosaic))(x, packed)
    exact = np.asarray(x).astype(np.float64), np.asarray(weight.dequantize()).astype(np.float64)
    # Products are exact and summed in float32: at worst one rounding a term.
    bound = weight.in_features * 2.0**-24 * (abs(exact[0]) @ abs(exact[1]) * 4)
    assert (abs(np.asarray(y) - exact[0] @ exact[1]) <= bound).all()
