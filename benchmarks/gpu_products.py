"""Products on a GPU, for benchmarks/gpu.py: values against float64, times beside other products, and decoding.

Every time is of a compiled loop over several weights, together more than twice the L2 cache, each product on inputs
that follow from the one before; so no weight and no input is at hand, and no launch is waited for. Compared are the
Hopper kernel, what XLA does otherwise, bfloat16 `x @ W`, XLA's own int4 (a group-scaled product with an int4 array),
and GPTQModel's Triton kernel if it and PyTorch are installed. `nothing` is the loop without products, and is part of
all other figures. `bandwidth` is the fraction of the measured rate of a copy, in bytes of the weight.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import decode
import jax
import jax.numpy as jnp
import numpy as np
import random_packed
from jax import lax

import jgptq
from jgptq import tensor
from jgptq.kernels.grouped import grouped_matmul

ROWS = (1, 4, 16, 64, 128, 256)
OTHERS = (1, 16, 128)  # rows at which the slower sides are timed too
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


def ahead(programs: Iterable[Callable[[], Any]]) -> list[Any]:
    """What each call gives, which lowers and compiles a program; several at a time."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(lambda program: program(), programs))


def otherwise(rows: int) -> str:
    """What matmul chooses for large weights where it has no kernel."""
    return "xla_codes" if rows <= 4 else "xla_slabs" if rows <= 128 else "xla"


def to_check(options: Any, hopper: bool) -> list[tuple]:
    """(shape, number of the grid, rows, dtype, implementation)."""
    if options.tiny:
        return [((200, 64), grid, rows, jnp.bfloat16, otherwise(rows)) for grid, rows in ((0, 1), (1, 9))]
    cases = [(SHAPES[0], grid, rows, jnp.bfloat16, otherwise(rows)) for grid in (0, 1) for rows in (1, 16, 256)]
    if hopper:
        cases += [(SHAPES[0], grid, rows, jnp.bfloat16, "hopper") for grid in range(7) for rows in (1, 16, 128)]
        cases += [(SHAPES[1], grid, rows, jnp.bfloat16, "hopper") for grid in (0, 1) for rows in (1, 33, 128)]
        cases += [(SHAPES[1], 1, 5, jnp.float16, "hopper"), (SHAPES[0], 5, 5, jnp.float16, "hopper")]
    return cases


def checked_weight(shape: tuple[int, int], number: int) -> jgptq.QuantizedTensor:
    """With its inputs in another order if its grid is symmetric."""
    bits, group, symmetric = GRIDS[number]
    grid, key = jgptq.Grid(bits=bits, group_size=group, symmetric=symmetric), jax.random.key(number)
    weight = random_packed.weight(key, *shape, grid=grid, dtype=jnp.bfloat16)
    order = jax.random.permutation(key, shape[0]).astype(jnp.int32) if symmetric else None
    return tensor.QuantizedTensor(**{**vars(weight), "permutation": order})


def values(options: Any, hopper: bool, found: dict, save: Callable[[], None]) -> None:
    """Relative errors against float64. Outputs are computed into memory that holds NaN."""
    cases, found["products"] = to_check(options, hopper), []

    def operand(case: tuple) -> Any:
        weight = checked_weight(*case[:2])
        return jgptq.prepack(weight) if case[-1] == "hopper" else weight

    def program(case: tuple) -> Any:
        (inputs, _), _, rows, dtype, name = case
        weight = jax.eval_shape(lambda: operand(case))
        return jax.jit(functools.partial(jgptq.matmul, implementation=name)).lower(
            jax.ShapeDtypeStruct((rows, inputs), dtype), weight
        ).compile()  # fmt: skip

    for case, product in zip(cases, ahead(functools.partial(program, case) for case in cases), strict=True):
        shape, number, rows, dtype, name = case
        x = jax.random.normal(jax.random.key(rows), (rows, shape[0]), dtype)
        weight = operand(case)
        jnp.full((max(rows, 8), 4 * shape[1]), jnp.nan, jnp.float32).block_until_ready().delete()
        y, kept = product(x, weight), min(shape[1], 512)  # float64 on the host; the last ones fill no tile
        some = np.r_[: kept // 2, shape[1] - kept // 2 : shape[1]]
        exact = np.asarray(x).astype(np.float64) @ np.asarray(weight.dequantize()[:, some]).astype(np.float64)
        found["products"].append({
            "shape": shape, "rows": rows, "grid": GRIDS[number], "dtype": x.dtype.name, "implementation": name,
            "relative_error": relative_error(y[:, some], exact),
        })  # fmt: skip
        save()
    found["experts_relative_error"] = experts_error((96, 64) if options.tiny else (4096, 4096))
    save()
    worst = max(found["products"], key=lambda row: row["relative_error"])
    print("largest error:", worst, found["experts_relative_error"], flush=True)
    if not max(worst["relative_error"], found["experts_relative_error"]) < TOLERANCE:
        raise SystemExit("values are wrong; their speed is not worth measuring")


def experts_error(shape: tuple[int, int]) -> float:
    """Of a grouped product of nine rows with three of four experts, prepacked: one of a stack, for the kernel."""
    grid, counts = jgptq.Grid(bits=4, group_size=32), (4, 0, 3, 2)
    stack = jax.vmap(lambda key: random_packed.weight(key, *shape, grid=grid, dtype=jnp.bfloat16))(
        jax.random.split(jax.random.key(0), 4)
    )
    x = jax.random.normal(jax.random.key(1), (9, shape[0]), jnp.bfloat16)
    y = jax.jit(grouped_matmul)(x, jgptq.prepack(stack), jnp.asarray(counts, jnp.int32))
    matrices = np.asarray(stack.dequantize()).astype(np.float64)[np.repeat(np.arange(4), counts)]
    return relative_error(y, np.einsum("ri,rio->ro", np.asarray(x).astype(np.float64), matrices))


def relative_error(y: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y).astype(np.float64) - exact) / np.linalg.norm(exact))


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of several runs, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def loop_program(product: Callable, x: jax.Array, weights: Sequence, loops: int) -> Any:
    """A compiled loop of products with each of the weights, `loops` times over. A scan would copy them."""

    def one_round(x: jax.Array, weights: Sequence) -> jax.Array:
        for weight in weights:
            y = product(x, weight)
            # The next inputs need this output, at the cost of one small fused operation.
            x = x + (jnp.sum(y, axis=-1, keepdims=True) * 1e-30).astype(x.dtype)
        return x

    def run(x: jax.Array, weights: Sequence) -> jax.Array:
        return lax.fori_loop(0, loops, lambda _, x: one_round(x, weights), x)

    return jax.jit(run).lower(x, weights).compile()


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


def race(shape: tuple[int, int], hopper: bool, options: Any, rate: float) -> Iterable[dict]:
    """Times of each side at each number of rows."""
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

    bfloat16, by_int4, prepacked, packed = (
        [jax.tree.map(lambda leaf: leaf[number], stack) for number in range(count)]  # noqa: B023
        for stack in (dense(keys), (int4(packed), packed.scales), jgptq.prepack(packed), packed)
    )

    def sides(rows: int) -> Iterable[tuple[str, Callable, Sequence]]:
        yield "nothing", lambda x, weight: x, prepacked
        yield "bfloat16", jnp.matmul, bfloat16
        if hopper and rows <= 128:
            yield "hopper", functools.partial(jgptq.matmul, implementation="hopper"), prepacked
        if rows in OTHERS or rows > 128 or options.tiny:
            yield otherwise(rows), functools.partial(jgptq.matmul, implementation=otherwise(rows)), packed
            yield "xla_int4", int4_product, by_int4

    inputs = {rows: jax.random.normal(jax.random.key(rows), (rows, shape[0]), jnp.bfloat16) for rows in options.rows}
    cases = [(rows, *side) for rows in options.rows for side in sides(rows)]
    programs = ahead(
        functools.partial(loop_program, product, inputs[rows], weights, options.loops)
        for rows, _, product, weights in cases
    )
    for rows in options.rows:
        row: dict[str, Any] = {"shape": shape, "rows": rows, "weights": count}
        for (number, name, _, weights), program in zip(cases, programs, strict=True):
            if number == rows:
                taken = seconds(functools.partial(program, inputs[rows], weights), options.repeats)
                row[f"{name}_microseconds"] = 1e6 * taken / (options.loops * count)
        triton = triton_seconds(rows, shape, count, options.repeats) if rows in OTHERS else None
        if triton is not None:
            row["gptqmodel_triton_microseconds"] = 1e6 * triton
        for name in ("hopper", otherwise(rows)):
            if f"{name}_microseconds" in row:
                row[f"{name}_over_bfloat16"] = row["bfloat16_microseconds"] / row[f"{name}_microseconds"]
                row[f"{name}_bandwidth"] = nbytes / (1e-6 * row[f"{name}_microseconds"]) / rate
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        yield row


def times(options: Any, hopper: bool, found: dict, save: Callable[[], None]) -> None:
    found["copy_bytes_a_second"] = copy_rate(10**6 if options.tiny else 2 * 10**9, options.repeats)
    found["products"] = []
    for shape in ((96, 160),) if options.tiny else SHAPES:
        for row in race(shape, hopper, options, found["copy_bytes_a_second"]):
            found["products"].append(row)
            save()


def decoding(options: Any, hopper: bool, found: dict, save: Callable[[], None]) -> None:
    """Tokens a second of a Llama of random weights, packed and in bfloat16.

    The packed one is arranged for decoding, and so prepacked on a Hopper; in bfloat16 that would copy each layer's
    weights for every token.
    """
    model = decode.llama(*options.model, heads=options.heads, kv_heads=options.heads // 4, vocab=options.vocab)
    grid = jgptq.Grid(bits=4, group_size=options.group, symmetric=True)
    make = functools.partial(random_packed.parameters, jax.random.key(0), model.parameter_shapes, dtype=jnp.bfloat16)
    sides = {"packed": model.arranged(make(grid=grid), donate=True), "bfloat16": make(grid=None)}
    found["batches"] = []
    for batch in (1,) if options.tiny else (1, 8, 32):
        row: dict[str, Any] = {"batch": batch}
        found["batches"].append(row)
        for name, params in sides.items():
            advance, facts = decode.decoder(model, params, batch)
            advance(2)
            started = time.perf_counter()
            advance(options.tokens)
            rate = options.tokens * batch / (time.perf_counter() - started)
            row |= {f"{name}_{key}": value for key, value in facts.items()} | {f"{name}_tokens_a_second": rate}
            save()
        row["packed_over_bfloat16"] = row["packed_tokens_a_second"] / row["bfloat16_tokens_a_second"]
        print(row, flush=True)
        save()
