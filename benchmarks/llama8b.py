"""Quantizing a model of the shape of Llama 3 8B, with random weights, end to end: seconds by phase and peak memory.

    python benchmarks/llama8b.py --output /tmp/llama8b.json                 # 128 windows of 2048 tokens
    python benchmarks/llama8b.py --gigabytes 24 --offload host --output …   # with so much of the GPU's memory
    python benchmarks/llama8b.py --tiny --output …                          # a small model, on any machine

Parameters are bfloat16 and lazy: each is a view of one pool of numbers, so that making them takes no time, and taking
them to the device takes what it does from a file in memory. `benchmarks/gpu.py` runs all of this. The result is written
when the run begins, after each layer and at the end, so that one which is stopped says how far it came.
"""

import argparse
import ctypes
import json
import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, LENGTH = 128, 2048


class View:
    """A lazy parameter: numbers of the pool from `start` on, in its shape; norms are ones."""

    def __init__(self, pool: np.ndarray, start: int, shape: tuple[int, ...]):
        self.pool, self.start, self.shape = pool, start, shape
        self.dtype, self.ndim = pool.dtype, len(shape)
        self.nbytes = math.prod(shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.ndim == 1:
            return np.ones(self.shape, self.dtype)[index]
        size = math.prod(self.shape)
        if size > self.pool.size:  # an embedding
            return np.resize(self.pool, self.shape)[index]
        start = self.start % (self.pool.size - size + 1)
        return self.pool[start : start + size].reshape(self.shape)[index]


def random_parameters(shapes: Any, *, hidden: int, intermediate: int) -> Any:
    """Parameters of these shapes, no two alike, with products of normal inputs about as large as those."""
    import jax

    size = hidden * intermediate
    pool = np.random.default_rng(0).standard_normal(size + size // 8, np.float32) / np.float32(hidden**0.5)
    pool = pool.astype(jax.numpy.bfloat16)
    leaves, tree = jax.tree.flatten(shapes)
    step = size // 8 // len(leaves)
    return jax.tree.unflatten(tree, [View(pool, number * step, leaf.shape) for number, leaf in enumerate(leaves)])


def device_memory() -> int:
    """Bytes of the first GPU, as its driver says; JAX cannot be asked before it has taken its part."""
    driver, device, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_size_t()
    for code in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device),
    ):
        if code:
            raise SystemExit(f"the CUDA driver gave error {code} when asked for the GPU's memory")
    return total.value


def run(options: Any) -> None:
    import jax
    import jax.numpy as jnp
    from decode import llama

    import jgptq
    from jgptq.solvers import descent

    if options.loop:
        descent.KERNEL_DEVICES = ()
    device, hidden, intermediate = jax.devices()[0], *((64, 192) if options.tiny else (4096, 14336))
    layers, vocab, heads = (1, 256, 4) if options.tiny else (32, 128256, 32)
    samples, length, batch = (4, 64, 2) if options.tiny else (SAMPLES, LENGTH, 4)
    model = llama(hidden, intermediate, layers, vocab=vocab, heads=heads, kv_heads=heads // 4)
    params = random_parameters(model.parameter_shapes, hidden=hidden, intermediate=intermediate)
    tokens = np.random.default_rng(1).integers(0, vocab, (samples // batch, batch, length), np.int32)
    settings = {
        "grid": jgptq.Grid(bits=4, group_size=32 if options.tiny else 128, symmetric=True),
        "quality": options.quality,
        "offload": options.offload,
    }
    expected = jgptq.estimate(
        model.apply, params, [(jax.ShapeDtypeStruct(x.shape, x.dtype),) for x in tokens], **settings
    )
    memory = device.memory_stats() or {}
    result: dict[str, Any] = {
        "device": device.device_kind,
        "model": {
            "hidden": hidden,
            "intermediate": intermediate,
            "layers": layers,
            "vocab": vocab,
            "dtype": "bfloat16",
        },
        "tokens": samples * length,
        "quality": options.quality,
        "offload": options.offload,
        "solver": "loop" if options.loop else "kernel where there is one",
        "memory_limit_bytes": memory.get("bytes_limit"),
        "parameter_bytes": expected.nbytes,
        "estimated_peak_bytes": expected.peak_nbytes,
        "estimated_peak": dict(expected.peak),
        "completed": False,
    }

    def write(**found: Any) -> None:
        result.update(found)
        text = options.output.with_suffix(".part")
        text.write_text(json.dumps(result, indent=1) + "\n")
        text.replace(options.output)

    started = time.perf_counter()

    def progress(row: jgptq.Row, number: int, count: int) -> None:
        if "down_proj" in row.path or number == count:
            print(f"{time.perf_counter() - started:6.1f} s  {number} of {count}: {row.path}", flush=True)
            write(weights_done=number, weights=count, seconds=time.perf_counter() - started)

    write()
    packed, report = jgptq.quantize(
        model.apply, params, [(jnp.asarray(x),) for x in tokens], progress=progress, profile=True, **settings
    )
    jax.block_until_ready(jax.tree.leaves(packed))
    memory = device.memory_stats() or {}
    write(
        completed=True,
        seconds=time.perf_counter() - started,
        phases=dict(report.profile),
        programs=report.programs,
        peak_bytes=memory.get("peak_bytes_in_use"),
        host_peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        packed_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(packed)),
        median_relative_error=statistics.median(row.relative_error for row in report.rows),
        notes=len(report.notes),
    )
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quality", choices=("fast", "balanced", "best"), default="balanced")
    parser.add_argument("--offload", choices=("host",))
    parser.add_argument("--gigabytes", type=float, help="of the GPU's memory that JAX may take")
    parser.add_argument("--loop", action="store_true", help="solve without the GPU's kernel")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.gigabytes and not options.tiny:
        # Read when JAX takes its memory.
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(1e9 * options.gigabytes / device_memory())
    run(options)


if __name__ == "__main__":
    main()
