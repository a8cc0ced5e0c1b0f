"""What quantization costs a language model: KL to the float model, perplexity and top-1 agreement, by method.

    python benchmarks/accuracy.py                        # the package's own model, on the standard library's source
    python benchmarks/accuracy.py --model stories260K --calibration train.txt --text held_out.txt

Each method quantizes the model once for every seed, which decides the calibration windows; then model and float model
read the same held-out tokens, in windows of each length asked for. A method's row is the mean over seeds and, after
the sign ±, the sample standard deviation. Round to nearest looks at no data, so its spread is zero. Seconds are those
of `jgptq.quantize`; a method's first run compiles. Results of one model replace those in the output file, which may
hold several models.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

import jgptq
from jgptq import calibration, demo_text

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "jgptq/demo_model"

METHODS = {
    "RTN": jgptq.RTN(),
    "GPTQ, natural order": jgptq.GPTQ(act_order=False, scale_search=False),
    "GPTQ, group order": jgptq.GPTQ(act_order="group", scale_search=False),
    "GPTQ, group order and scale search (default)": jgptq.GPTQ(),
}
MEASURES = ("kl", "perplexity", "top1_agreement", "seconds")


def texts(file: Path | None, *, held_out: bool) -> list[str]:
    return demo_text.read_modules(held_out=held_out) if file is None else calibration.read_documents(file)


def measure(args, model, params, tokenizer) -> list[dict]:
    """One row for each bit width, method and window length."""
    tokens = calibration.encode(texts(args.text, held_out=True), tokenizer)[: args.tokens]
    if len(tokens) < args.tokens:
        raise SystemExit(f"the evaluation text has {len(tokens)} tokens, fewer than --tokens {args.tokens}")
    source = texts(args.calibration, held_out=False)
    draws = [
        calibration.batches(source, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=seed)
        for seed in range(args.seeds)
    ]
    rows = []
    for bits in args.bits:
        grid = jgptq.Grid(bits=bits, group_size=args.group_size, symmetric=args.symmetric)
        for name, method in METHODS.items():
            runs: dict[int, list[dict]] = {window: [] for window in args.windows}
            for draw in draws:
                started = time.perf_counter()
                packed, report = jgptq.quantize(model.apply, params, draw, grid=grid, method=method)
                seconds = time.perf_counter() - started
                for window in args.windows:
                    cost = jgptq.compare(
                        model,
                        packed,
                        model,
                        params,
                        tokens,
                        seq_len=window,
                        bos_token_id=calibration.bos_token(tokenizer),
                    )
                    runs[window].append(dataclasses.asdict(cost) | {"seconds": seconds, "notes": report.notes})
            for window in args.windows:
                row = {"bits": bits, "method": name, "window": window, **summary(runs[window]), "runs": runs[window]}
                rows.append(row)
                print(line(row), flush=True)
    return rows


def summary(runs: list[dict]) -> dict:
    """Mean and sample standard deviation of each measure over seeds."""
    columns = {key: [run[key] for run in runs] for key in MEASURES}
    return {
        "reference_perplexity": runs[0]["reference_perplexity"],
        "scored_tokens": runs[0]["tokens"],
        "mean": {key: statistics.fmean(column) for key, column in columns.items()},
        "spread": {key: statistics.stdev(column) if len(column) > 1 else 0.0 for key, column in columns.items()},
    }


def line(row: dict) -> str:
    mean, spread = row["mean"], row["spread"]
    return (
        f"{row['bits']} bits  {row['method']:46}  window {row['window']:4}  KL {mean['kl']:.4f} ± {spread['kl']:.4f}  "
        f"perplexity {mean['perplexity']:.3f} ± {spread['perplexity']:.3f} (float {row['reference_perplexity']:.3f})  "
        f"top-1 {100 * mean['top1_agreement']:.1f} %  {mean['seconds']:.1f} s"
    )


def command(arguments: list[str]) -> str:
    """What reproduces the figures: where they were written is left out."""
    if "--output" in arguments:
        place = arguments.index("--output")
        arguments = arguments[:place] + arguments[place + 2 :]
    return " ".join(["python", "benchmarks/accuracy.py", *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a Hugging Face model directory")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on (default: standard library)")
    parser.add_argument("--text", type=Path, help="text to evaluate on (default: standard library, held out)")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens evaluated, from the beginning of the text")
    parser.add_argument(
        "--windows", type=int, nargs="+", help="tokens in an evaluation window (default: 256 and the model's context)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/accuracy-cpu.json")
    args = parser.parse_args()

    model, params = jgptq.load(args.model, dtype=jnp.float32)
    args.windows = args.windows or sorted({256, model.config.max_position_embeddings})
    rows = measure(args, model, params, calibration.load_tokenizer(args.model))
    result = {
        "command": command(sys.argv[1:]),
        "device": f"{platform.machine()} {jax.default_backend().upper()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "jgptq": jgptq.__version__,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **{name: getattr(args, name) for name in ("group_size", "symmetric", "seeds", "samples", "seq_len", "tokens")},
        "rows": rows,
    }
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results[args.model.resolve().name] = result
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
