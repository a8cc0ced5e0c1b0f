"""GPTQ on one weight with a given Hessian: jgptq.gptq against the paper's own algorithm in PyTorch, on the CPU.

    python benchmarks/solver.py                          # 4096×4096, writes benchmarks/results/solver-cpu.json
    python benchmarks/solver.py --in-features 1024 --out-features 1024 --output /tmp/solver.json

First the codes of both are checked against the float64 oracle of tests/reference.py at 64×512, for every width. Then
the two run in turn, torch, jgptq, torch, jgptq …, on the same weight and Hessian. On a machine with other work the
CPU seconds of the process say more than the wall clock. torch runs in several forms beforehand, one and more threads
in its column loop, torch.cholesky_inverse as in the original or triangular solves, and the fastest form is the one
that races. Needs PyTorch: pip install torch.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jgptq
from jgptq import tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import reference  # noqa: E402
import reference_gptq_torch  # noqa: E402


def hessian_of(x: np.ndarray) -> jgptq.Hessian:
    return jgptq.update_hessian(jgptq.init_hessian(x.shape[1]), jnp.asarray(x))


def check(bits: int, symmetric: bool) -> dict:
    """Agreement of both solvers with the float64 oracle on a 64×512 weight, group 32."""
    w, x = reference.problem(64, 512)
    hessian = hessian_of(x)
    h = np.asarray(hessian.mean())
    grid = jgptq.Grid(bits=bits, group_size=32, symmetric=symmetric)
    weight, info = jgptq.gptq(jnp.asarray(w), hessian, grid)
    theirs = reference_gptq_torch.gptq(
        torch.from_numpy(w), torch.tensor(h), bits=bits, group_size=32, symmetric=symmetric
    )
    oracle = reference.gptq(w, h, bits=bits, group_size=32, symmetric=symmetric)
    zeros = np.full(weight.scales.shape, grid.midpoint) if weight.zeros is None else weight.zeros
    ours = reference.agreement(tensor.unpack_codes(weight), weight.scales, zeros, oracle, bits=bits)
    torchs = reference.agreement(theirs.codes, theirs.scales, theirs.zeros, oracle, bits=bits)
    row = {
        "bits": bits,
        "symmetric": symmetric,
        "jgptq_codes_equal": ours.equal,
        "jgptq_near_ties": ours.ties,
        "jgptq_unexplained": ours.unexplained,
        "jgptq_loss_relative_difference": abs(float(info.loss) / oracle.loss - 1),
        "torch_codes_equal": torchs.equal,
        "torch_loss_relative_difference": abs(float(theirs.loss) / oracle.loss - 1),
    }
    print(row, flush=True)
    if ours.equal < 0.999 or ours.unexplained or row["jgptq_loss_relative_difference"] > 1e-3:
        raise SystemExit("jgptq.gptq disagrees with the float64 oracle; its speed is not worth measuring")
    return row


def timed(run) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def compare(torch_rows: list[dict], jax_rows: list[dict], summary) -> dict:
    """Wall and CPU seconds of both sides and their ratio; `summary`: median, or min for a machine with other work."""
    table = {}
    for key in ("wall_seconds", "cpu_seconds"):
        theirs, ours = (summary([row[key] for row in rows]) for rows in (torch_rows, jax_rows))
        table[key] = {"torch": theirs, "jgptq": ours, "jgptq_over_torch": ours / theirs}
    return table


def race(args) -> dict:
    """Compiles jgptq.gptq, lets each side warm up, then runs both in turn."""
    rng = np.random.default_rng(0)
    n = args.in_features
    # Correlated inputs with the spectrum i^-0.75, mixed by random reflections.
    x = rng.standard_normal((2 * n, n), np.float32) * np.arange(1, n + 1, dtype=np.float32) ** -0.375
    for _ in range(4):
        v = rng.standard_normal(n, np.float32)
        x -= np.outer(x @ v, v * (2 / (v @ v)))
    w = rng.standard_normal((n, args.out_features), np.float32)
    hessian = jax.block_until_ready(hessian_of(x))
    jax_w, torch_w, torch_h = jnp.asarray(w), torch.from_numpy(w), torch.tensor(np.asarray(hessian.mean()))
    grid = jgptq.Grid(bits=args.bits, group_size=args.group_size)

    solve = jax.jit(lambda w, hessian: jgptq.gptq(w, hessian, grid, act_order=False, block_size=128))
    lowered = solve.lower(jax_w, hessian)
    compile_time = timed(lowered.compile)

    def ours():
        return jax.block_until_ready(solve(jax_w, hessian))

    forms = [
        {"loop_threads": loop_threads, "cholesky_inverse": cholesky_inverse}
        for loop_threads in sorted({1, args.threads})
        for cholesky_inverse in (False, True)
    ]

    def theirs(form):
        return reference_gptq_torch.gptq(
            torch_w, torch_h, bits=args.bits, group_size=args.group_size, threads=args.threads, **form
        )

    (_, info), solution = ours(), theirs(forms[0])
    warm_up = [{**form, **timed(functools.partial(theirs, form))} for form in forms]
    print(*warm_up, sep="\n", flush=True)
    form = forms[min(range(len(forms)), key=lambda k: warm_up[k][args.judge])]
    torch_rows, torch_splits, jax_rows = [], [], []
    for _ in range(args.repeats):
        torch_rows.append(timed(lambda: torch_splits.append(theirs(form).cpu_seconds)))
        jax_rows.append(timed(ours))
        print(f"torch {torch_rows[-1]}\njgptq {jax_rows[-1]}", flush=True)
    return {
        "compile": compile_time,
        "torch": {
            "form": form,
            "warm_up": warm_up,
            "runs": torch_rows,
            "cpu_seconds_split": {
                part: statistics.median(split[part] for split in torch_splits) for part in torch_splits[0]
            },
        },
        "jgptq": {"runs": jax_rows},
        **{summary.__name__: compare(torch_rows, jax_rows, summary) for summary in (statistics.median, min)},
        "loss": {"torch": float(solution.loss), "jgptq": float(info.loss)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--judge", choices=("wall_seconds", "cpu_seconds"), default="cpu_seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/solver-cpu.json")
    args = parser.parse_args()

    agreement = [check(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]
    result = {
        "command": " ".join(["python", "benchmarks/solver.py", *sys.argv[1:]]),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "jgptq": jgptq.__version__,
        },
        "in_features": args.in_features,
        "out_features": args.out_features,
        "bits": args.bits,
        "group_size": args.group_size,
        "dtype": "float32",
        "load_average_at_start": os.getloadavg()[0],
        "agreement_with_float64_at_64x512": agreement,
        **race(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps({key: result[key] for key in ("median", "min")}, indent=1),
        f"\ncompiled in {result['compile']}\nwrote {args.output}",
    )


if __name__ == "__main__":
    main()
