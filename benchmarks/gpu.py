"""The packed product on a GPU: values against float64 first, then times, then decoding; and the solver. One command.

    python benchmarks/gpu.py                   # an NVIDIA H100 or H200; writes benchmarks/results/gpu-<device>.json
    python benchmarks/gpu.py --tiny            # small shapes, on any machine: only shows that the script runs

Every time is of a compiled loop over several weights, together more than twice the L2 cache, each product on inputs
that follow from the one before; so no weight and no input is at hand, and no launch is waited for. Compared are the
implementations of jgptq.matmul, bfloat16 `x @ W`, XLA's own int4 (a group-scaled product with an int4 array), and
GPTQModel's Triton kernel if it and PyTorch are installed. `bandwidth` is the fraction of the measured rate of a copy,
in bytes of the weight. Nothing is timed whose relative error is above 5e-3. The solver's kernel for the inputs of a
block must give the codes of its loop before solves are timed, beside the paper's own algorithm in PyTorch if that is
installed.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jgptq
from jgptq import tensor
from jgptq.solvers import PRESETS, descent

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import decode  # noqa: E402
import random_packed  # noqa: E402

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
# Bits, group size, symmetric: what is checked; only the first is timed.
GRIDS = (
    (4, 128, True),
    (4, 128, False),
    (4, 64, False),
    (4, 32, False),
    (4, None, True),
    (8, 128, False),
    (3, 128, True),
)
L2_BYTES = 60e6
TOLERANCE = 5e-3
SOLVES = ((4096, 4096), (14336, 4096), (28672, 8192))


def relative_error(y: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y).astype(np.float64) - exact) / np.linalg.norm(exact))


def check(shape: tuple[int, int], rows: tuple[int, ...], grid: jgptq.Grid, permuted: bool, names: list) -> list[dict]:
    """Relative errors at each number of rows against float64. Outputs are computed into memory that holds NaN."""
    key = jax.random.fold_in(jax.random.key(1), hash((shape, grid.bits, grid.group_size)) % 2**31)
    weight = random_packed.weight(key, *shape, grid=grid, dtype=jnp.bfloat16)
    if permuted:
        order = jax.random.permutation(key, shape[0]).astype(jnp.int32)
        weight = tensor.QuantizedTensor(**{**vars(weight), "permutation": order})
    columns = min(shape[1], 512)  # float64 on the host; the last ones, which fill no tile, among them
    some = np.r_[: columns // 2, shape[1] - columns // 2 : shape[1]]
    exact_weight = np.asarray(tensor.matrix(weight)[:, some]).astype(np.float64)
    found = []
    for dtype in (jnp.bfloat16, jnp.float16):
        for count in rows:
            x = jax.random.normal(jax.random.fold_in(key, count), (count, shape[0]), dtype)
            exact = np.asarray(x).astype(np.float64) @ exact_weight
            for name in names:
                if name in ("hopper", "xla_codes") and count > 128:
                    continue
                operand = jgptq.prepack(weight) if name == "hopper" else weight
                product = jax.jit(functools.partial(jgptq.matmul, implementation=name))
                poison = jnp.full((max(count, 8), 4 * shape[1]), jnp.nan, jnp.float32).block_until_ready()
                poison.delete()
                y = product(x, operand)[:, some]
                found.append({
                    "shape": shape, "rows": count, "bits": grid.bits, "group_size": grid.group_size,
                    "symmetric": grid.symmetric, "permuted": permuted, "dtype": x.dtype.name,
                    "implementation": name, "relative_error": relative_error(y, exact),
                })  # fmt: skip
    return found


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of several runs, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def product_seconds(product: Callable, x: jax.Array, weights: Any, count: int, *, loops: int, repeats: int) -> float:
    """Seconds of one product, in a loop over `count` stacked weights that is run `loops` times in one program."""

    def one(x: jax.Array, weight: Any) -> tuple[jax.Array, None]:
        y = product(x, weight)
        # The next inputs need this output, at the cost of one small fused operation.
        return x + (jnp.sum(y, axis=-1, keepdims=True) * 1e-30).astype(x.dtype), None

    @jax.jit
    def run(x: jax.Array, weights: Any) -> jax.Array:
        return lax.fori_loop(0, loops, lambda _, x: lax.scan(one, x, weights)[0], x)

    return seconds(lambda: run(x, weights), repeats) / (loops * count)


def copy_rate(nbytes: int, repeats: int) -> float:
    """Bytes a second read and written, of a copy on the device."""
    array = jnp.ones(nbytes // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * array.nbytes / seconds(lambda: copy(array), repeats)


def int4_product(x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> jax.Array:
    """XLA's own path: an int4 array, its scales by group, and the library's product of what that gives."""
    codes, scales = weight
    dense = (codes.astype(x.dtype) * jnp.expand_dims(scales.astype(x.dtype), 1)).reshape(x.shape[-1], -1)
    return jnp.matmul(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)


def triton_seconds(rows: int, shape: tuple[int, int], count: int, repeats: int) -> float | None:
    """GPTQModel's Triton kernel under PyTorch, called one weight after another; None where it is not installed."""
    try:
        import torch
        from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
    except ImportError:
        return None
    layers = [
        TritonV2Linear(bits=4, group_size=128, sym=True, desc_act=False, in_features=shape[0], out_features=shape[1])
        .cuda()
        .eval()
        for _ in range(count)
    ]
    for layer in layers:
        layer.qweight.random_()
        layer.scales.uniform_(0.01, 0.02)
        layer.post_init()
    x = torch.randn(rows, shape[0], dtype=torch.float16, device="cuda")
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for layer in layers:
                layer(x)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / count)
    return statistics.median(times[2:])


def race(shape: tuple[int, int], rows: tuple[int, ...], names: list, options: Any, rate: float) -> list[dict]:
    """Times of each side at each number of rows, in one run."""
    grid, nbytes = jgptq.Grid(bits=4, group_size=options.group, symmetric=True), shape[0] * shape[1] / 2
    count = max(2, min(options.weights, -(-int(2.5 * L2_BYTES) // int(nbytes))))
    keys = jax.random.split(jax.random.key(2), count)
    make = jax.jit(lambda key: random_packed.weight(key, *shape, grid=grid, dtype=jnp.bfloat16))
    packed = lax.map(make, keys)
    groups = (shape[0] // options.group, options.group, shape[1])

    @jax.jit
    def dense(keys: jax.Array) -> jax.Array:
        return lax.map(lambda key: jax.random.normal(key, shape, jnp.bfloat16) / shape[0] ** 0.5, keys)

    @jax.jit
    def int4(weight: jgptq.QuantizedTensor) -> jax.Array:
        return (tensor.unpack_codes(weight).astype(jnp.int8) - 8).astype(jnp.int4).reshape(count, *groups)

    sides = {"bfloat16": (jnp.matmul, dense(keys)), "xla_int4": (int4_product, (int4(packed), packed.scales))}
    for name in names:
        operand = jgptq.prepack(packed) if name == "hopper" else packed
        sides[name] = functools.partial(jgptq.matmul, implementation=name), operand
    found = []
    for number in rows:
        x = jax.random.normal(jax.random.key(number), (number, shape[0]), jnp.bfloat16)
        row: dict[str, Any] = {"shape": shape, "rows": number, "weights": count}
        for name, (product, weights) in sides.items():
            if name == "xla_codes" and number > 16:
                continue
            taken = product_seconds(product, x, weights, count, loops=options.loops, repeats=options.repeats)
            row[f"{name}_microseconds"] = 1e6 * taken
        triton = triton_seconds(number, shape, count, options.repeats)
        if triton is not None:
            row["gptqmodel_triton_microseconds"] = 1e6 * triton
        for name in names:
            if f"{name}_microseconds" in row:
                row[f"{name}_over_bfloat16"] = row["bfloat16_microseconds"] / row[f"{name}_microseconds"]
                row[f"{name}_bandwidth"] = nbytes / (1e-6 * row[f"{name}_microseconds"]) / rate
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        found.append(row)
    return found


def decoding(options: Any, batches: tuple[int, ...]) -> list[dict]:
    """Tokens a second of a Llama of random weights, packed and in bfloat16, one model on the device at a time.

    The packed one is arranged for decoding, and so prepacked on a Hopper; in bfloat16 that would copy each layer's
    weights for every token.
    """
    model = decode.llama(*options.model, heads=options.heads, kv_heads=options.heads // 4, vocab=options.vocab)
    rows = [{"batch": batch} for batch in batches]
    grid = jgptq.Grid(bits=4, group_size=options.group, symmetric=True)
    for name, chosen in (("bfloat16", None), ("packed", grid)):
        params = random_packed.parameters(jax.random.key(0), model.parameter_shapes, grid=chosen, dtype=jnp.bfloat16)
        if chosen is not None:
            params = model.arranged(params, donate=True)
        for row in rows:
            advance, facts = decode.decoder(model, params, row["batch"])
            advance(2)
            started = time.perf_counter()
            advance(options.tokens)
            rate = options.tokens * row["batch"] / (time.perf_counter() - started)
            row |= {f"{name}_{key}": value for key, value in facts.items()} | {f"{name}_tokens_a_second": rate}
        del params, advance
    for row in rows:
        row["packed_over_bfloat16"] = row["packed_tokens_a_second"] / row["bfloat16_tokens_a_second"]
        print(row, flush=True)
    return rows


def solver(grid: jgptq.Grid, *, kernel: bool, quality: str = "fast") -> Callable:
    """A compiled solve of a weight with a Hessian. kernel: on a Hopper, rather than the loop."""
    method = PRESETS["gptq"][quality]

    def solve(w: jax.Array, hessian: jgptq.Hessian) -> Any:
        # Read when the solve is traced.
        kept, descent.KERNEL_DEVICES = descent.KERNEL_DEVICES, descent.KERNEL_DEVICES if kernel else ()
        try:
            return method.solve(w, hessian, grid)
        finally:
            descent.KERNEL_DEVICES = kept

    compiled = jax.jit(solve)

    def run(w: jax.Array, hessian: jgptq.Hessian) -> Any:
        jax.clear_caches()  # the parts of a solve are compiled for themselves, with or without the kernel
        program = compiled.lower(w, hessian).compile()
        return lambda: program(w, hessian)

    return run


def problem(shape: tuple[int, int]) -> tuple[jax.Array, jgptq.Hessian]:
    keys = jax.random.split(jax.random.key(3))
    spectrum = jnp.arange(1, shape[0] + 1, dtype=jnp.float32) ** -0.375
    hessian = jgptq.init_hessian(shape[0])
    for number in range(-(-shape[0] // 4096) + 1):
        tokens = jax.random.normal(jax.random.fold_in(keys[0], number), (4096, shape[0])) * spectrum
        hessian = jgptq.update_hessian(hessian, tokens)
    return jax.random.normal(keys[1], shape), hessian


def same_codes(shape: tuple[int, int], grid: jgptq.Grid) -> dict:
    """Of the kernel's solve and the loop's: a product of the two that differ in rounding may turn a code over."""
    (ours, info), (loop, other) = (solver(grid, kernel=kernel)(*problem(shape))() for kernel in (True, False))
    equal = float(jnp.mean(tensor.unpack_codes(ours) == tensor.unpack_codes(loop)))
    losses = float(info.loss), float(other.loss)
    row = {"shape": shape, "codes_equal": equal, "loss_of_kernel": losses[0], "loss_of_loop": losses[1]}
    print(row, flush=True)
    if not (equal > 0.98 and abs(losses[0] / losses[1] - 1) < 1e-3):
        raise SystemExit("the solver's kernel is wrong: empty KERNEL_DEVICES in jgptq/solvers/descent.py")
    return row


def torch_solve_seconds(w: jax.Array, hessian: jgptq.Hessian, options: Any) -> float | None:
    """The paper's own algorithm on the GPU under PyTorch; None where there is none."""
    try:
        import reference_gptq_torch
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    operands = (torch.tensor(np.asarray(array)) for array in (w, hessian.mean()))
    with torch.device("cuda"), torch.inference_mode():
        torch_w, torch_h = (array.cuda() for array in operands)
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            reference_gptq_torch.gptq(
                torch_w, torch_h, bits=4, group_size=options.group, cholesky_inverse=True, symmetric=True
            )
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    torch.cuda.empty_cache()
    return times[-1]


def solving(options: Any, shapes: tuple[tuple[int, int], ...], hopper: bool) -> dict:
    """Seconds of solves, the Hessian given; first whether the kernel is right."""
    grid = jgptq.Grid(bits=4, group_size=options.group, symmetric=True)
    result: dict[str, Any] = {"agreement": same_codes((192, 200) if options.tiny else (1024, 1000), grid), "times": []}
    for shape in shapes:
        w, hessian = problem(shape)
        row: dict[str, Any] = {"shape": shape}
        for name, kernel, quality in (
            ("kernel", True, "fast"),
            ("loop", False, "fast"),
            ("balanced", True, "balanced"),
        ):
            if (kernel and quality == "fast" and not hopper) or (quality == "balanced" and shape != shapes[0]):
                continue
            row[f"{name}_seconds"] = seconds(solver(grid, kernel=kernel, quality=quality)(w, hessian), options.repeats)
        row["torch_seconds"] = torch_solve_seconds(w, hessian, options)
        print(row, flush=True)
        result["times"].append(row)
    return result


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes and few repeats, on any machine")
    parser.add_argument("--only", choices=("values", "times", "decoding", "solves"), help="one part of the four")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    full = {"loops": 20, "repeats": 5, "weights": 16, "group": 128, "tokens": 64, "vocab": 128256, "heads": 32}
    tiny = {"loops": 1, "repeats": 1, "weights": 2, "group": 32, "tokens": 2, "vocab": 64, "heads": 4}
    vars(options).update(tiny if options.tiny else full, model=(64, 96, 2) if options.tiny else (4096, 14336, 32))
    return options


def main() -> None:
    options = parsed()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.tiny:
        raise SystemExit(f"this machine has {device.device_kind} and no GPU; give --tiny to see that the script runs")
    hopper = device.platform == "gpu" and str(device.compute_capability) == "9.0"
    names = [*(["hopper"] if hopper else []), "xla", "xla_codes"]
    shapes = ((200, 64),) if options.tiny else SHAPES
    rows = (1, 9) if options.tiny else ROWS
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "device": device.device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jgptq": jgptq.__version__},
        "implementations": names,
    }
    if options.only in (None, "values"):
        result["values"] = []
        for shape in shapes[:2]:
            for bits, group, symmetric in GRIDS[:2] if options.tiny else GRIDS:
                grid = jgptq.Grid(bits=bits, group_size=group, symmetric=symmetric)
                result["values"] += check(shape, (1, 9) if options.tiny else (1, 5, 128, 1024), grid, symmetric, names)
        worst = max(result["values"], key=lambda row: row["relative_error"])
        print("largest error:", worst, flush=True)
        if not worst["relative_error"] < TOLERANCE:
            raise SystemExit("values are wrong; their speed is not worth measuring")
    if options.only in (None, "times"):
        result["copy_bytes_a_second"] = copy_rate(10**6 if options.tiny else 2 * 10**9, options.repeats)
        timed = ((96, 160),) if options.tiny else SHAPES
        result["times"] = [
            row for shape in timed for row in race(shape, rows, names, options, result["copy_bytes_a_second"])
        ]
    if options.only in (None, "decoding"):
        result["decoding"] = decoding(options, (1,) if options.tiny else (1, 8, 32))
    if options.only in (None, "solves"):
        result["solves"] = solving(options, ((96, 160),) if options.tiny else SOLVES, hopper)
    kind = device.device_kind.lower().replace(" ", "-")
    output = options.output or ROOT / "benchmarks" / "results" / f"gpu-{kind}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
