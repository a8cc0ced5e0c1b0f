"""Kernels compiled for GPUs on a machine without one: spills, stack and instructions of the Hopper kernels, memory.

    python -m venv /tmp/aot && . /tmp/aot/bin/activate && pip install -e . absl-py jax==0.10.2
    pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 triton
    python benchmarks/sass.py                  # writes benchmarks/results/sass-h200.json

The kernels, of products and of the solver's inputs one by one, are compiled for an H200; products and gradients of few
rows, which XLA does by itself, for an A100. Fails if a kernel spills registers or has a stack frame, if its program
takes more memory besides its arguments than partial sums and inputs of one product do, or than the codes of one of
several experts, or if one of XLA's takes a quarter of what the weight would in float. Instructions a weight are those
of the loop that a warp runs for each block, over the weights it decodes; they are counted where ptxas and nvdisasm are
found (Triton's package has both). At the rate at which an H200 copies memory, 4-bit weights leave time for about 3.6.
"""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

DUMP = tempfile.mkdtemp(prefix="jgptq-sass-")
os.environ |= {"MOSAIC_GPU_DUMP_TO": DUMP, "JAX_PLATFORMS": "cpu"}

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

import jgptq  # noqa: E402
from jgptq.kernels.grouped import grouped_matmul  # noqa: E402
from jgptq.kernels.hopper import Plan  # noqa: E402
from jgptq.solvers import hopper  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import random_packed  # noqa: E402

# An H200 by its data sheet and the CUDA programming guide's table of compute capability 9.0.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
# inputs, outputs, bits, group size, symmetric, rows, dtype
PRODUCTS = [
    (4096, 4096, 4, 128, True, 1, "bfloat16"),
    (4096, 4096, 4, 128, False, 1, "bfloat16"),
    (4096, 4096, 4, 128, False, 16, "float16"),
    (4096, 14336, 4, 128, True, 16, "bfloat16"),
    (4096, 14336, 4, 128, True, 64, "bfloat16"),
    (14336, 4096, 4, 128, True, 128, "bfloat16"),
    (8192, 28672, 4, 128, True, 16, "bfloat16"),
    (4096, 4096, 4, None, True, 1, "bfloat16"),
    (4096, 4096, 4, 64, False, 128, "bfloat16"),
    (4096, 4096, 4, 32, False, 16, "bfloat16"),
    (4096, 4096, 3, 128, True, 1, "bfloat16"),
    (4096, 4096, 8, 128, True, 1, "bfloat16"),
    (4096, 4096, 8, 32, False, 64, "bfloat16"),
    (4096, 4096, 8, 128, False, 8, "float16"),
]
# The same fields for experts, eight of them: one row for a choice of a token, and more.
EXPERTS = [(4096, 14336, 4, 128, True, 2, "bfloat16"), (4096, 14336, 4, 128, True, 128, "bfloat16")]
# Inputs and outputs of a block of a solve: one and two warpgroups a program.
BLOCKS = [(128, 4096), (128, 16384), (32, 4096)]
# An A100 likewise, from the table of compute capability 8.0.
AMPERE = TARGET
for own, other in {
    "NVIDIA H200": "NVIDIA A100",
    "core_count: 132": "core_count: 108",
    "major: 9 feature_extension: ACCELERATED_FEATURES": "major: 8",
    "shared_memory_per_core: 233472": "shared_memory_per_core: 167936",
    "shared_memory_per_block_optin: 232448": "shared_memory_per_block_optin: 166912",
    "l2_cache_size: 62914560": "l2_cache_size: 41943040",
}.items():
    AMPERE = AMPERE.replace(own, other)
# The same fields, where XLA has a product to itself.
XLA_PRODUCTS = [
    (4096, 14336, 4, 128, True, 1, "bfloat16"),
    (4096, 14336, 4, 128, False, 4, "bfloat16"),
    (4096, 4096, 3, 128, False, 4, "float16"),
    (4096, 4096, 8, 32, False, 2, "float32"),
    (4096, 14336, 4, 128, False, 64, "bfloat16"),
]


def tool(name: str) -> str | None:
    bundled = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or (str(bundled) if bundled.exists() else None)


def loop_of(ptx: Path) -> collections.Counter | None:
    """Instructions of the shortest loop with a product in it, which is the one over blocks."""
    if not (tool("ptxas") and tool("nvdisasm")):
        return None
    cubin = ptx.with_suffix(".cubin")
    subprocess.run([tool("ptxas"), "-arch=sm_90a", ptx, "-o", cubin], check=True)
    text = subprocess.run([tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    found, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", line):
            found.append(instruction[1])
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            if instruction[1] == "BRA" and target and target[1] in labels:
                loops.append(found[labels[target[1]] :])
    return collections.Counter(min((loop for loop in loops if "HGMMA" in loop), key=len))


def operands(product: tuple, device: jax.Device) -> tuple:
    """The shapes of x and of the weight, on a device that is not there."""
    inputs, outputs, bits, group_size, symmetric, rows, dtype = product
    grid = jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = jax.eval_shape(lambda: random_packed.weight(jax.random.key(0), inputs, outputs, grid=grid, dtype=dtype))
    there = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        (jax.ShapeDtypeStruct((rows, inputs), dtype), weight),
    )


def program(f: Callable, *arguments: Any, kind: str, cores: int) -> Any:
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        return jax.jit(f).lower(*arguments).compile()


def gradient(x: jax.Array, weight: jgptq.QuantizedTensor) -> jax.Array:
    y, pull = jax.vjp(lambda x: jgptq.matmul(x, weight), x)
    return pull(y)[0]


def by_xla(product: tuple, device: jax.Device) -> list[dict]:
    """The memory of a product and of its gradient."""
    inputs, outputs, *_, dtype = product
    found = []
    for f in (jgptq.matmul, gradient):
        memory = program(f, *operands(product, device), kind="NVIDIA A100", cores=108).memory_analysis()
        found.append({
            "product": product,
            "of": f.__name__,
            "temporary_bytes": memory.temp_size_in_bytes,
            "allowed_bytes": inputs * outputs * jax.numpy.dtype(dtype).itemsize // 4,
        })  # fmt: skip
    return found


def kernel_facts(f: Callable, *arguments: Any) -> tuple[dict, Path]:
    """Of f compiled for an H200 with one kernel: what ptxas says of that, the program's memory, the kernel's PTX."""
    for old in Path(DUMP).iterdir():
        old.unlink()
    memory = program(f, *arguments, kind="NVIDIA H200", cores=132).memory_analysis()
    (report,), (ptx,) = (list(Path(DUMP).glob(f"*.{kind}")) for kind in ("ptxas", "ptx"))
    text = report.read_text()
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", text)
    facts = {
        "stack_spill_stores_spill_loads": [int(number) for number in numbers.groups()],
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return facts, ptx


def experts(product: tuple, device: jax.Device) -> dict:
    """A grouped product of eight experts, with less memory than a copy of one expert's codes."""
    inputs, outputs, bits, *_ = product
    x, weight = operands(product, device)
    there = jax.sharding.SingleDeviceSharding(device)
    stack = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype, sharding=there),
        jax.eval_shape(jgptq.prepack, weight),
    )
    counts = jax.ShapeDtypeStruct((8,), "int32", sharding=there)
    facts, _ = kernel_facts(grouped_matmul, x, stack, counts)
    return {"experts": product, **facts, "allowed_bytes": inputs * outputs * bits // 8}


def block_of_inputs(shape: tuple[int, int], device: jax.Device) -> dict:
    (n, out), there = shape, jax.sharding.SingleDeviceSharding(device)
    shapes = (n, out), (n, out), (n, n), (n,), (out,), (out,), ()
    facts, _ = kernel_facts(
        hopper.solve, *(jax.ShapeDtypeStruct(shape, jax.numpy.float32, sharding=there) for shape in shapes)
    )
    return {"block": shape, **facts, "allowed_bytes": 2**16}


def compiled(product: tuple, device: jax.Device) -> dict:
    rows = product[-2]
    x, weight = operands(product, device)
    there = jax.sharding.SingleDeviceSharding(device)
    weight = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), jax.eval_shape(jgptq.prepack, weight)
    )
    facts, ptx = kernel_facts(jgptq.matmul, x, weight)
    plan, loop = Plan.of(rows, weight), loop_of(ptx)
    # The result itself if the kernel writes it, cut to the rows there are; else partial sums, and they added.
    result = 2 if plan.split == 1 else 8 * plan.split
    row = {
        "product": product,
        "plan": vars(plan),
        **facts,
        "allowed_bytes": plan.tokens * (result * weight.outputs + 4 * 128 * weight.blocks) + 2**16,
    }
    if loop is not None:
        # 128 threads decode a block of 128 inputs, so each decodes as many weights as there are outputs.
        row |= {"instructions_a_weight": round(loop.total() / plan.outputs, 2), "loop": dict(loop.most_common(10))}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sass-h200.json")
    parser.add_argument("--few", action="store_true", help="every third product, which is what the tests take")
    options = parser.parse_args()
    hopper_device, ampere = (
        topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
        for target in (TARGET, AMPERE)
    )
    step = 3 if options.few else 1
    rows = []
    for product in PRODUCTS[::step]:
        rows.append(compiled(product, hopper_device))
        print(rows[-1], flush=True)
    for product in EXPERTS[::step]:
        rows.append(experts(product, hopper_device))
        print(rows[-1], flush=True)
    for shape in BLOCKS[::step]:
        rows.append(block_of_inputs(shape, hopper_device))
        print(rows[-1], flush=True)
    others = [row for product in XLA_PRODUCTS[::step] for row in by_xla(product, ampere)]
    print(*others, sep="\n", flush=True)
    result = {
        "command": "python benchmarks/sass.py",
        "target": "NVIDIA H200 (sm_90a), compiled without a GPU",
        "versions": {"jax": jax.__version__, "jgptq": jgptq.__version__},
        "products": rows,
        "xla_on_a100": others,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(DUMP)
    bad = [
        next(iter(row.values()))
        for row in rows + others
        if any(row.get("stack_spill_stores_spill_loads", ())) or row["temporary_bytes"] > row["allowed_bytes"]
    ]
    if bad:
        raise SystemExit(f"these spill registers, have a stack frame or take too much memory: {bad}")


if __name__ == "__main__":
    main()
