"""The TPU kernel compiled for TPUs, on a machine without one: that their compiler takes it, and what memory it needs.

    python -m venv /tmp/aot && . /tmp/aot/bin/activate && pip install -e . jax==0.10.2 "libtpu==0.0.42.*"
    python benchmarks/tpu.py                   # writes benchmarks/results/tpu-compiled.json

Fails if a program takes more memory besides its arguments than the inputs and results of one product do.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# The plugin would ask the network of a cloud's machine what TPUs it has.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is there to be kept for one process
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}

import jax
from jax.experimental import topologies

import jgptq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import random_packed  # noqa: E402

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
# inputs, outputs, bits, group size, symmetric, rows, dtype
PRODUCTS = [
    (4096, 4096, 4, 128, True, 1, "bfloat16"),
    (4096, 14336, 4, 128, False, 16, "bfloat16"),
    (14336, 4096, 4, 32, False, 128, "bfloat16"),
    (8192, 28672, 4, 64, True, 64, "float32"),
    (200, 10, 4, None, True, 1, "float32"),
    (4096, 4096, 8, 128, False, 8, "float32"),
    (1000, 300, 8, 32, False, 128, "bfloat16"),
]


def compiled(product: tuple, device: jax.Device) -> dict:
    inputs, outputs, bits, group_size, symmetric, rows, dtype = product
    grid = jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = jax.eval_shape(lambda: random_packed.weight(jax.random.key(0), inputs, outputs, grid=grid, dtype=dtype))
    there = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        (jax.ShapeDtypeStruct((rows, inputs), dtype), weight),
    )
    abstract = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        program = jax.jit(jgptq.matmul).lower(*arguments).compile()
    return {
        "device": device.device_kind,
        "product": product,
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        # Inputs and results as they are and in three parts; float16 scales as their bits.
        "allowed_bytes": 4 * max(rows, 16) * 4 * (2 * inputs + outputs) + 2 * weight.scales.size + 2**16,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tpu-compiled.json")
    parser.add_argument("--few", action="store_true", help="every third product, which is what the tests take")
    options = parser.parse_args()
    rows = []
    for name in TOPOLOGIES:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for product in PRODUCTS[:: 3 if options.few else 1]:
            rows.append(compiled(product, device))
            print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/tpu.py",
        "versions": {"jax": jax.__version__, "jgptq": jgptq.__version__},
        "products": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    bad = [row["product"] for row in rows if row["kernels"] != 1 or row["temporary_bytes"] > row["allowed_bytes"]]
    if bad:
        raise SystemExit(f"these are no kernel or take too much memory: {bad}")


if __name__ == "__main__":
    main()
