"""What quantization costs a language model: KL to the float model, perplexity, top-1 agreement and seconds, by recipe.

    python benchmarks/accuracy.py                        # the package's own model, on the standard library's source
    python benchmarks/accuracy.py --model stories260K --calibration train.txt --text held_out.txt
    python benchmarks/accuracy.py … --bits 4 3 2 --group-sizes 32 64 128 --grids asymmetric symmetric
    python benchmarks/accuracy.py --summary              # ratios over all models and settings in the output file

Each recipe quantizes the model once for every seed, which decides the calibration windows; then model and float model
read the same held-out tokens. A row is the mean over seeds and, after the sign ±, the sample standard deviation. Round
to nearest looks at no data, so its spread is zero. Seconds are those of `jgptq.quantize`; a recipe's first run
compiles. Results of one model replace those of the same model and settings in the output file.

The peer's recipe (group-aware order, min/max grids, damping 0.05, no targets) runs in jgptq; where gptqmodel can be
imported, gptqmodel quantizes the model on the same tokens as well (`--gptqmodel`).
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
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
PEER = "peer's recipe"
STRONGEST = "Lp search, target 0.25"
GPTQMODEL = "gptqmodel"
BEST = "best"
TUNED = "best, tuned"
RECIPES = {
    "RTN": jgptq.RTN(),
    "plain GPTQ": jgptq.GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None),
    PEER: jgptq.GPTQ(scale_search=None, sweeps=0, damp=0.05, targets=None),
    STRONGEST: jgptq.GPTQ(scale_search="lp", sweeps=0, targets=jgptq.Targets(inputs=0.25, residual=0.0)),
    **jgptq.PRESETS["gptq"],
    TUNED: jgptq.PRESETS["gptq"][BEST],
}
MEASURES = ("kl", "perplexity", "top1_agreement", "seconds")


def texts(file: Path | None, *, held_out: bool) -> list[str]:
    return demo_text.read_modules(held_out=held_out) if file is None else calibration.read_documents(file)


def by_gptqmodel(args, grid: jgptq.Grid, batches: list) -> tuple[object, dict, float]:
    """The model as gptqmodel quantizes it on the same windows: model, parameters, seconds."""
    # It cannot start with fewer than two workers, and by itself takes one on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, len(os.sched_getaffinity(0)))))
    import gptqmodel
    import torch

    rows = [torch.tensor(np.asarray(row), dtype=torch.long)[None] for (batch,) in batches for row in batch]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    config = gptqmodel.QuantizeConfig(
        bits=grid.bits, group_size=grid.group_size, sym=grid.symmetric, offload_to_disk=False, pack_impl="original"
    )
    theirs = gptqmodel.GPTQModel.load(str(args.model), config, device="cpu", dtype=torch.float32)
    started = time.perf_counter()
    theirs.quantize(data, batch_size=8)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        theirs.save(directory)
        model, params = jgptq.load(directory, dtype=jnp.float32)
    return model, params, seconds


def measure(args, model, params, tokenizer) -> list[dict]:
    """One row for each setting and recipe."""
    tokens = calibration.encode(texts(args.text, held_out=True), tokenizer)[: args.tokens]
    if len(tokens) < args.tokens:
        raise SystemExit(f"the evaluation text has {len(tokens)} tokens, fewer than --tokens {args.tokens}")
    source = texts(args.calibration, held_out=False)
    draws = [
        calibration.batches(source, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=seed)
        for seed in range(args.seeds)
    ]
    rows = []
    recipes = {name: RECIPES[name] for name in args.recipes} | ({GPTQMODEL: None} if args.gptqmodel else {})
    for bits, group_size, kind in itertools.product(args.bits, args.group_sizes, args.grids):
        grid = jgptq.Grid(bits=bits, group_size=group_size, symmetric=kind == "symmetric")
        best = []
        for name, method in recipes.items():
            runs = []
            for number, draw in enumerate(draws):
                started = time.perf_counter()
                if method is None:
                    served, packed, seconds = by_gptqmodel(args, grid, draw)
                else:
                    served, (packed, before) = model, best[number] if name == TUNED and best else (None, 0.0)
                    if packed is None:
                        packed, _ = jgptq.quantize(model.apply, params, draw, grid=grid, method=method)
                    if name == TUNED:
                        packed, _ = jgptq.tune(model.apply, params, packed, draw)
                    seconds = before + time.perf_counter() - started
                    if name == BEST:
                        best.append((packed, seconds))
                bos = calibration.bos_token(tokenizer)
                cost = jgptq.compare(served, packed, model, params, tokens, seq_len=args.window, bos_token_id=bos)
                runs.append(dataclasses.asdict(cost) | {"seconds": seconds})
            rows.append({"bits": bits, "group_size": group_size, "grid": kind, "recipe": name, **summary(runs)})
            print(line(rows[-1]), flush=True)
    return rows


def summary(runs: list[dict]) -> dict:
    """Mean and sample standard deviation of each measure over seeds."""
    columns = {key: [run[key] for run in runs] for key in MEASURES}
    return {
        "reference_perplexity": runs[0]["reference_perplexity"],
        "scored_tokens": runs[0]["tokens"],
        "mean": {key: statistics.fmean(column) for key, column in columns.items()},
        "spread": {key: statistics.stdev(column) if len(column) > 1 else 0.0 for key, column in columns.items()},
        "runs": [{key: run[key] for key in MEASURES} for run in runs],
    }


def line(row: dict) -> str:
    mean, spread = row["mean"], row["spread"]
    return (
        f"{row['bits']} bits, {row['group_size']:3}, {row['grid']:10}  {row['recipe']:22}  "
        f"KL {mean['kl']:.4f} ± {spread['kl']:.4f}  "
        f"perplexity {mean['perplexity']:.3f} ± {spread['perplexity']:.3f} (float {row['reference_perplexity']:.3f})  "
        f"top-1 {100 * mean['top1_agreement']:.1f} %  {mean['seconds']:.1f} s"
    )


def ratios(results: dict, bits: int, recipe: str, reference: str) -> list[tuple[float, float, str]]:
    """For each model and setting: KL over the reference's, the reference's relative spread with this one's, where."""
    found = []
    for model, result in results.items():
        rows = {(row["group_size"], row["grid"], row["recipe"]): row for row in result["rows"] if row["bits"] == bits}
        for (group_size, kind, name), row in rows.items():
            other = rows.get((group_size, kind, reference))
            if name == recipe and other:
                ratio = row["mean"]["kl"] / other["mean"]["kl"]
                spread = (row["spread"]["kl"] + other["spread"]["kl"]) / other["mean"]["kl"]
                found.append((ratio, spread, f"{model} {group_size} {kind}"))
    return found


def print_summary(results: dict) -> None:
    """The geometric mean of KL ratios over models and settings, and the largest of them."""
    for reference in (PEER, GPTQMODEL, STRONGEST):
        for bits, recipe in itertools.product((4, 3, 2), (*RECIPES, GPTQMODEL)):
            if recipe != reference and (found := ratios(results, bits, recipe, reference)):
                mean = math.exp(statistics.fmean(math.log(ratio) for ratio, *_ in found))
                largest, spread, where = max(found)
                print(
                    f"{bits} bits  {recipe:22} over {reference:22} {mean:.3f} over {len(found):2} settings; "
                    f"largest {largest:.3f} (spread {spread:.3f}: {where})"
                )


def command(arguments: list[str], script: str) -> str:
    """What reproduces the figures: where they were written, and where texts and models lay, is left out."""
    if "--output" in arguments:
        place = arguments.index("--output")
        arguments = arguments[:place] + arguments[place + 2 :]
    return " ".join(["python", f"benchmarks/{script}", *(Path(part).name or part for part in arguments)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a Hugging Face model directory")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on (default: standard library)")
    parser.add_argument("--text", type=Path, help="text to evaluate on (default: standard library, held out)")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2))
    parser.add_argument("--group-sizes", type=int, nargs="+", default=(32,))
    parser.add_argument("--grids", nargs="+", choices=("asymmetric", "symmetric"), default=("asymmetric",))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    parser.add_argument("--gptqmodel", action="store_true", help="gptqmodel itself as well, where it can be imported")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens evaluated, from the beginning of the text")
    parser.add_argument("--window", type=int, default=256, help="tokens in an evaluation window")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/accuracy-cpu.json")
    parser.add_argument("--summary", action="store_true", help="only print what the output file says in sum")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if args.summary:
        print_summary(results)
        return

    model, params = jgptq.load(args.model, dtype=jnp.float32)
    context = model.config.max_position_embeddings
    args.seq_len, args.window = min(args.seq_len, context), min(args.window, context)
    rows = measure(args, model, params, calibration.load_tokenizer(args.model))
    key = args.model.resolve().name
    same = {(row["bits"], row["group_size"], row["grid"], row["recipe"]) for row in rows}
    kept = [
        row
        for row in results.get(key, {}).get("rows", [])
        if (row["bits"], row["group_size"], row["grid"], row["recipe"]) not in same
    ]
    results[key] = {
        "command": command(sys.argv[1:], "accuracy.py"),
        "device": f"{platform.machine()} {jax.default_backend().upper()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "jgptq": jgptq.__version__,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **{name: getattr(args, name) for name in ("seeds", "samples", "seq_len", "tokens", "window")},
        "rows": kept + rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
