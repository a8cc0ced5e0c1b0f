"""The solver alone: error of single weights on held-out activations, by recipe, against the peer's default.

    python benchmarks/layers.py                          # the package's own model, on the standard library's source
    python benchmarks/layers.py --model DIRECTORY [...] --calibration train.txt --text held_out.txt
    python benchmarks/layers.py --synthetic              # and two weights of 512 inputs with a decaying spectrum

For every weight, the float model's activations on the calibration text make one Hessian and those on the held-out text
another; the first is solved on, the second judges: tr(ΔᵀHΔ). No weight sees another's error and nothing is propagated.
A figure is the geometric mean over weights of a recipe's error over that of the peer's default (group-aware order,
min/max grids, damping 0.05). Seconds are those of all solves, compilation included.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from accuracy import DEMO_MODEL, PEER, RECIPES, ROOT, command, texts

import jgptq
from jgptq import calibration
from jgptq.executor import Executor

SOLVERS = {name: RECIPES[name] for name in ("RTN", "plain GPTQ", PEER, "fast", "balanced", "best")}


def of_model(directory: Path, args) -> list[tuple[jax.Array, jgptq.Hessian, jgptq.Hessian]]:
    """Each weight of a model with its Hessians on calibration and on held-out text."""
    model, params = jgptq.load(directory, dtype=jnp.float32)
    tokenizer = calibration.load_tokenizer(directory)
    seq_len = min(args.seq_len, model.config.max_position_embeddings)
    sources = (args.calibration, False, args.samples), (args.text, True, args.tokens // seq_len)
    found = []
    for file, held_out, samples in sources:
        draw = calibration.batches(texts(file, held_out=held_out), tokenizer, samples=samples, seq_len=seq_len, seed=0)
        executor = Executor(model.apply, params, draw)
        steps = executor.choose()
        found.append([(step, executor.moments(step)[0]) for step in steps])
    return [
        (part.layout.to_matrix(executor.leaf(part.leaf, part.index)), calibrated, other)
        for (step, calibrated), (_, other) in zip(*found, strict=True)
        for part in step.parts
    ]


def synthetic() -> list[tuple[jax.Array, jgptq.Hessian, jgptq.Hessian]]:
    """Weights of 512 inputs and outputs; inputs mixed from independent ones of the spectrum i^-0.75, a few larger."""
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        n = 512
        mixing = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.arange(1, n + 1) ** -0.375
        mixing = mixing.T * np.exp(rng.standard_normal(n))
        hessians = [
            jgptq.update_hessian(
                jgptq.init_hessian(n), jnp.asarray(rng.standard_normal((16 * n, n)) @ mixing, jnp.float32)
            )
            for _ in range(2)
        ]
        found.append((jnp.asarray(rng.standard_normal((n, n)), jnp.float32), *hessians))
    return found


def measure(weights: list, grid: jgptq.Grid) -> dict[str, dict]:
    """By recipe: the geometric mean of errors over the peer's, the worst, and seconds."""
    errors, seconds = defaultdict(list), {}
    for name, method in SOLVERS.items():
        started = time.perf_counter()
        for w, hessian, held_out in weights:
            packed, _ = method.solve(w, hessian, grid)
            errors[name].append(float(held_out.energy(w - jgptq.dequantize(packed))))
        seconds[name] = time.perf_counter() - started
    rows = {}
    for name, own in errors.items():
        over = [a / b for a, b in zip(own, errors[PEER], strict=True)]
        mean = math.exp(statistics.fmean(map(math.log, over)))
        rows[name] = {"error_over_peer": mean, "largest": max(over), "seconds": seconds[name]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=(DEMO_MODEL,), help="Hugging Face model directories")
    parser.add_argument("--synthetic", action="store_true", help="synthetic weights as well")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on (default: standard library)")
    parser.add_argument("--text", type=Path, help="text to judge by (default: standard library, held out)")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2))
    parser.add_argument("--group-sizes", type=int, nargs="+", default=(128,))
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/layers-cpu.json")
    args = parser.parse_args()
    sources = {directory.resolve().name: of_model(directory, args) for directory in args.model}
    if args.synthetic:
        sources["synthetic"] = synthetic()
    rows = []
    settings = itertools.product(args.bits, args.group_sizes, ("asymmetric", "symmetric"), sources.items())
    for bits, group_size, kind, (source, weights) in settings:
        grid = jgptq.Grid(bits=bits, group_size=group_size, symmetric=kind == "symmetric")
        for name, row in measure(weights, grid).items():
            rows.append({"bits": bits, "group_size": group_size, "grid": kind, "source": source, "recipe": name, **row})
            print(
                f"{bits} bits, {group_size:3}, {kind:10}  {source:26}  {name:14}  error over peer's "
                f"{row['error_over_peer']:.3f}, largest {row['largest']:.3f}  {row['seconds']:.1f} s",
                flush=True,
            )
    result = {
        "command": command(sys.argv[1:], "layers.py"),
        "device": f"{platform.machine()} {jax.default_backend().upper()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jgptq": jgptq.__version__},
        "weights": {name: len(weights) for name, weights in sources.items()},
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for bits, kind, name in itertools.product(args.bits, ("asymmetric", "symmetric"), SOLVERS):
        found = [r["error_over_peer"] for r in rows if (r["bits"], r["grid"], r["recipe"]) == (bits, kind, name)]
        print(f"{bits} bits, {kind:10}  {name:14} {math.exp(statistics.fmean(map(math.log, found))):.3f}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
