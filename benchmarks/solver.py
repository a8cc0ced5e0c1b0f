"""GPTQ on one weight with a given Hessian: jgptq.gptq against the paper's own algorithm in PyTorch, on the CPU.

    python benchmarks/solver.py                          # three shapes, writes benchmarks/results/solver-cpu.json
    python benchmarks/solver.py --shapes 1024x1024 --output /tmp/solver.json

First the codes of all are checked against the float64 oracle of tests/reference.py at 64×512, for every width. Then
for each shape (in×out) the sides run in turn, original, tuned, jgptq, original …, on the same weight and Hessian.
`original` has the layout and the operations of the authors' implementation; `tuned` has contiguous rows for columns,
and one thread in the column loop (benchmarks/reference_gptq_torch.py). At the end what `quality=` stands for solves a
1024×1024 weight. On a machine with other work the CPU seconds of the process say more than the wall clock, and the
least of several more than their median. Needs PyTorch: pip install torch.
"""

import argparse
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
from jgptq.solvers import PRESETS, QUALITIES

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import reference  # noqa: E402
import reference_gptq_torch  # noqa: E402

# The peers, and what makes their weight of one that is (in, out).
FORMS = {
    "original": (reference_gptq_torch.original, lambda w: w.T.contiguous()),
    "tuned": (reference_gptq_torch.tuned, lambda w: w),
}


def hessian_of(x: np.ndarray) -> jgptq.Hessian:
    return jgptq.update_hessian(jgptq.init_hessian(x.shape[1]), jnp.asarray(x))


def check(bits: int, symmetric: bool) -> dict:
    """Agreement of all solvers with the float64 oracle on a 64×512 weight, group 32."""
    w, x = reference.problem(64, 512)
    hessian = hessian_of(x)
    h = np.asarray(hessian.mean())
    grid = jgptq.Grid(bits=bits, group_size=32, symmetric=symmetric)
    weight, info = jgptq.gptq(jnp.asarray(w), hessian, grid)
    theirs = [
        form(layout(torch.from_numpy(w)), torch.tensor(h), bits=bits, group_size=32, symmetric=symmetric)
        for form, layout in FORMS.values()
    ]
    oracle = reference.gptq(w, h, bits=bits, group_size=32, symmetric=symmetric)
    zeros = np.full(weight.scales.shape, grid.midpoint) if weight.zeros is None else weight.zeros
    ours = reference.agreement(tensor.unpack_codes(weight), weight.scales, zeros, oracle, bits=bits)
    torchs = [reference.agreement(their.codes, their.scales, their.zeros, oracle, bits=bits) for their in theirs]
    row = {
        "bits": bits,
        "symmetric": symmetric,
        "jgptq_codes_equal": ours.equal,
        "jgptq_near_ties": ours.ties,
        "jgptq_unexplained": ours.unexplained,
        "jgptq_loss_relative_difference": abs(float(info.loss) / oracle.loss - 1),
        "torch_codes_equal": min(found.equal for found in torchs),
        "torch_loss_relative_difference": max(abs(float(their.loss) / oracle.loss - 1) for their in theirs),
    }
    print(row, flush=True)
    if ours.equal < 0.999 or ours.unexplained or row["jgptq_loss_relative_difference"] > 1e-3:
        raise SystemExit("jgptq.gptq disagrees with the float64 oracle; its speed is not worth measuring")
    if row["torch_codes_equal"] < 0.999:
        raise SystemExit("the peer disagrees with the float64 oracle; its speed says nothing")
    return row


def timed(run) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def problem(n: int, out: int) -> tuple[np.ndarray, jgptq.Hessian]:
    """A normal weight, and the Hessian of correlated inputs with the spectrum i^-0.75, mixed by random reflections."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + 1024, n), np.float32) * np.arange(1, n + 1, dtype=np.float32) ** -0.375
    for _ in range(4):
        v = rng.standard_normal(n, np.float32)
        x -= np.outer(x @ v, v * (2 / (v @ v)))
    return rng.standard_normal((n, out), np.float32), jax.block_until_ready(hessian_of(x))


def summarized(sides: dict[str, list[dict]]) -> dict:
    """Median and least wall and CPU seconds of each side, and jgptq's over each of the others'."""
    table = {}
    for summary in (statistics.median, min):
        for key in ("wall_seconds", "cpu_seconds"):
            values = {name: summary([row[key] for row in rows]) for name, rows in sides.items()}
            ratios = {f"jgptq_over_{name}": values["jgptq"] / values[name] for name in FORMS}
            table[f"{summary.__name__}_{key}"] = values | ratios
    return table


def race(shape: tuple[int, int], args) -> dict:
    """Compiles jgptq.gptq, lets each side warm up, then runs all in turn."""
    w, hessian = problem(*shape)
    jax_w, torch_w, torch_h = jnp.asarray(w), torch.from_numpy(w), torch.tensor(np.asarray(hessian.mean()))
    grid = jgptq.Grid(bits=args.bits, group_size=args.group_size)

    solve = jax.jit(lambda w, hessian: jgptq.gptq(w, hessian, grid, act_order=False))
    compile_time = timed(solve.lower(jax_w, hessian).compile)

    def ours():
        return jax.block_until_ready(solve(jax_w, hessian))

    torch_weights = {form: layout(torch_w) for form, (_, layout) in FORMS.items()}

    def theirs(form):
        options = {"bits": args.bits, "group_size": args.group_size, "threads": args.threads}
        return FORMS[form][0](torch_weights[form], torch_h, **options)

    losses = {"jgptq": float(ours()[1].loss)} | {form: float(theirs(form).loss) for form in FORMS}
    sides: dict[str, list[dict]] = {name: [] for name in (*FORMS, "jgptq")}
    for _ in range(args.repeats):
        for form in FORMS:
            splits: list[dict] = []
            row = timed(lambda form=form, splits=splits: splits.append(theirs(form).cpu_seconds))
            sides[form].append(row | {"cpu_seconds_split": splits[0]})
        sides["jgptq"].append(timed(ours))
        print({name: rows[-1] for name, rows in sides.items()}, flush=True)
    return {
        "in_features": shape[0],
        "out_features": shape[1],
        "compile": compile_time,
        "runs": sides,
        **summarized(sides),
        "loss": losses,
    }


def qualities(args) -> list[dict]:
    """What `quality=` stands for on one weight, the Hessian given; seconds after compilation."""
    w, hessian = problem(1024, 1024)
    grid, rows = jgptq.Grid(bits=args.bits, group_size=args.group_size), []
    for quality in QUALITIES:
        method = PRESETS["gptq"][quality]

        def solve(method=method):
            return jax.block_until_ready(method.solve(jnp.asarray(w), hessian, grid))

        first = timed(solve)
        runs = [timed(solve) for _ in range(args.repeats)]
        least = {f"min_{key}": min(run[key] for run in runs) for key in ("wall_seconds", "cpu_seconds")}
        error = float(solve()[1].relative_error)
        rows.append({"quality": quality, "with_compilation": first, **least, "relative_error": error})
        print(rows[-1], flush=True)
    return rows


def shape_of(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["4096x4096", "4096x11008", "11008x4096"]
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=list(map(shape_of, shapes)), help="in x out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/solver-cpu.json")
    args = parser.parse_args()

    load_average = os.getloadavg()[0]
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
        "bits": args.bits,
        "group_size": args.group_size,
        "dtype": "float32",
        "load_average_at_start": load_average,
        "agreement_with_float64_at_64x512": agreement,
        "shapes": [race(shape, args) for shape in args.shapes],
        "qualities_at_1024x1024": qualities(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for key, title in (("min_cpu_seconds", "CPU"), ("min_wall_seconds", "Wall")):
        print(f"{title} seconds, the least of each side:")
        print(f"{'in x out':>13} {'original':>9} {'tuned':>9} {'jgptq':>9} {'/original':>9} {'/tuned':>9}")
        for row in result["shapes"]:
            shape = f"{row['in_features']} x {row['out_features']}"
            print(f"{shape:>13}", *(f"{value:9.2f}" for value in row[key].values()))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
