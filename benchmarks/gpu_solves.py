"""Solves on a GPU, for benchmarks/gpu.py: seconds with a Hopper's kernel, with the loop, and of PyTorch.

The kernel for the inputs of a block must first give the codes of the loop. PyTorch runs the paper's own algorithm, if
it is installed and finds the GPU.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_products import seconds

import jgptq
from jgptq import tensor
from jgptq.solvers import PRESETS, descent

SOLVES = ((4096, 4096), (14336, 4096), (28672, 8192))


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


def torch_solve_seconds(w: jax.Array, hessian: jgptq.Hessian, options: Any) -> dict[str, float]:
    """Both forms of the paper's own algorithm on the GPU under PyTorch; none where there is no PyTorch for it."""
    try:
        import reference_gptq_torch
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    operands = (torch.tensor(np.asarray(array)) for array in (w, hessian.mean()))
    times = {}
    with torch.device("cuda"), torch.inference_mode():
        torch_w, torch_h = (array.cuda() for array in operands)
        columns = torch_w.T.contiguous()
        for form, own in (("original", columns), ("tuned", torch_w)):
            for _ in range(2):
                torch.cuda.synchronize()
                started = time.perf_counter()
                getattr(reference_gptq_torch, form)(own, torch_h, bits=4, group_size=options.group, symmetric=True)
                torch.cuda.synchronize()
                times[form] = time.perf_counter() - started
    torch.cuda.empty_cache()
    return times


def solves(options: Any, hopper: bool, found: dict, save: Callable[[], None]) -> None:
    """Seconds of solves, the Hessian given; first whether the kernel is right."""
    grid = jgptq.Grid(bits=4, group_size=options.group, symmetric=True)
    found["agreement"] = same_codes((192, 200) if options.tiny else (1024, 1000), grid)
    found["times"] = []
    for shape in ((96, 160),) if options.tiny else SOLVES:
        w, hessian = problem(shape)
        row: dict[str, Any] = {"shape": shape}
        found["times"].append(row)
        sides = [("kernel", True, "fast")] * hopper + [("loop", False, "fast")]
        for name, kernel, quality in sides + [("balanced", True, "balanced")] * (shape == SOLVES[0]):
            row[f"{name}_seconds"] = seconds(solver(grid, kernel=kernel, quality=quality)(w, hessian), options.repeats)
            save()
        row["torch_seconds"] = torch_solve_seconds(w, hessian, options)
        own = row["kernel_seconds" if hopper else "loop_seconds"]
        row["speed_over_torch"] = {form: theirs / own for form, theirs in row["torch_seconds"].items()}
        print(row, flush=True)
        save()
