"""What the sequential executor costs, on the CPU: tracing and segmenting a large model, and quantizing a small one.

    python benchmarks/executor.py                        # all parts, writes benchmarks/results/executor-cpu.json
    python benchmarks/executor.py --skip-quantize --output /tmp/executor.json

Segmenting: functions of the size of Llama-3-8B with parameters that are shapes only, one with its layers in a list
(jgptq's Llama) and one that scans over stacked layers. Seconds to trace and to make all segments, and the distinct
programs they need, which is what would be compiled. The first run of each is judged: it finds JAX's caches empty.

Summing: one batch added to a Hessian, against one product of its tokens, in turn.

Quantizing: jgptq.quantize of a 12-layer Llama with random weights against its unavoidable work, two plain jitted
forward passes over the same batches and the bare solves, GPTQ().solve on each weight with its Hessian ready. With
compiling: each side once, from jax.clear_caches(). Without: both have run before and then run in turn. On a machine
with other work the CPU seconds of the process say more than the wall clock.
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
from jax import lax

import jgptq
from jgptq.models import MODELS, LanguageModel
from jgptq.tracing.graph import trace
from jgptq.tracing.segments import segment

ROOT = Path(__file__).resolve().parents[1]
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
# Inputs and tokens.
SUMS = ((768, 4096), (2048, 1024), (2048, 4096), (4096, 2048), (11008, 2048))
LIMITS = {"trace_and_segment_seconds": 10, "programs": 12, "quantize_over_unavoidable": 3}


def llama(config: dict) -> LanguageModel:
    return LanguageModel(architecture=MODELS["llama"], config=MODELS["llama"].parse_config(config))


def stacked_llama_8b():
    """A bare decoder that scans over stacked layers, no rotary embedding; and the shapes of its parameters."""
    width, hidden, heads, kv_heads, layers, head = 4096, 14336, 32, 8, 32, 128
    shapes = {
        "q": (width, kv_heads, heads // kv_heads, head),
        "k": (width, kv_heads, head),
        "v": (width, kv_heads, head),
        "o": (kv_heads, heads // kv_heads, head, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "attention_norm": (width,),
        "mlp_norm": (width,),
    }
    vocab = LLAMA_8B["vocab_size"]
    abstract = {name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in shapes.items()}
    params = {
        "embedding": jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        "layers": abstract,
        "head": jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    }

    def norm(scale, x):
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale

    def layer(x, p):
        h = norm(p["attention_norm"], x)
        q = jnp.einsum("btd,dghk->btghk", h, p["q"])
        k, v = (jnp.einsum("btd,dgk->btgk", h, p[name]) for name in "kv")
        scores = jnp.einsum("btghk,bsgk->bghts", q, k) * head**-0.5
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mixed = jnp.einsum("bghts,bsgk->btghk", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)
        x = x + jnp.einsum("btghk,ghkd->btd", mixed, p["o"])
        h = norm(p["mlp_norm"], x)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    def f(params, tokens):
        return lax.scan(layer, params["embedding"][tokens], params["layers"])[0] @ params["head"]

    return f, params


def trace_and_segment(f, params, tokens) -> dict:
    """Traces f and makes every segment that jgptq.quantize would run, from one step to the next."""
    clock = time.perf_counter()
    graph = trace(f, params, tokens)
    traced = time.perf_counter()
    steps = graph.steps([site.leaf for site in graph.sites if site.quantizable])
    programs, segments, position = set(), 0, 0
    for stop in [step.start for step in steps]:
        if stop > position:
            live = {var for var, last in graph.last_use.items() if last >= stop}
            programs.add(segment(graph, position, stop, live).program)
            segments, position = segments + 1, stop
    done = time.perf_counter()
    return {
        "trace_seconds": traced - clock,
        "segment_seconds": done - traced,
        "trace_and_segment_seconds": done - clock,
        "equations": len(graph.equations),
        "quantizable_leaves": sum(site.quantizable for site in graph.sites),
        "weights": sum(len(step.parts) for step in steps),
        "segments": segments,
        "programs": len(programs),
    }


def segmenting(repeats: int) -> dict:
    model = llama(LLAMA_8B)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    results = {}
    for name, (f, params) in {
        "llama_8b_layers_in_a_list": (model.apply, model.parameter_shapes),
        "llama_8b_scan_over_stacked_layers": stacked_llama_8b(),
    }.items():
        runs = []
        for _ in range(repeats):
            jax.clear_caches()
            runs.append(trace_and_segment(f, params, tokens))
        sites = jgptq.find_weights(f, params, tokens)
        assert sum(site.quantizable for site in sites) == runs[0]["quantizable_leaves"]
        seconds = [run["trace_and_segment_seconds"] for run in runs]
        results[name] = {
            **runs[0],
            "trace_and_segment_seconds_of_all_runs": seconds,
            "median_seconds": statistics.median(seconds),
            "within_limits": seconds[0] < LIMITS["trace_and_segment_seconds"]
            and runs[0]["programs"] <= LIMITS["programs"],
        }
        print(
            f"{name}: {seconds[0]:.2f} s (median of {repeats}: {statistics.median(seconds):.2f}), "
            f"{runs[0]['equations']} equations, {runs[0]['weights']} weights, {runs[0]['segments']} segments, "
            f"{runs[0]['programs']} distinct programs",
            flush=True,
        )
    return results


class Recorder:
    """A method that keeps what each solve was given, and rounds to nearest."""

    name = "recorder"

    def __init__(self):
        self.given = []

    def solve(self, w, hessian, grid):
        self.given.append((w, hessian))
        return jgptq.RTN().solve(w, hessian, grid)


def timed(run) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def summing(repeats: int) -> list[dict]:
    """update_hessian, mirroring included, and xᵀx of the same tokens."""

    @jax.jit
    def product(x):
        return jnp.dot(x.T, x, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    found = []
    for inputs, tokens in SUMS:
        for dtype in ("float32", "bfloat16"):
            x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, inputs)), dtype)
            hessian = jgptq.init_hessian(inputs)
            sides = {
                "update_hessian": lambda x=x, hessian=hessian: jgptq.update_hessian(hessian, x).total,
                "product": lambda x=x: product(x),
            }
            runs: dict[str, list[dict]] = {name: [] for name in sides}
            for number in range(5 * repeats + 1):
                for name, run in sides.items():
                    seconds = timed(lambda run=run: run().block_until_ready())
                    if number:  # the first compiles
                        runs[name].append(seconds)
            least = {name: min(run["cpu_seconds"] for run in own) for name, own in runs.items()}
            found.append(
                {"inputs": inputs, "tokens": tokens, "dtype": dtype, "least_cpu_seconds": least}
                | {"over_product": least["update_hessian"] / least["product"], "runs": runs}
            )
            print(
                f"{inputs} inputs, {tokens} tokens, {dtype}: {found[-1]['over_product']:.2f} of one product", flush=True
            )
    return found


def quantizing(args) -> dict:
    model, grid = llama(SMALL), jgptq.Grid(bits=4, group_size=128)
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (args.sequences, 512)).astype(np.int32)
    batches = [tokens[i : i + args.batch_size] for i in range(0, args.sequences, args.batch_size)]
    recorder, reports = Recorder(), []
    jgptq.quantize(model.apply, params, batches, grid=grid, method=recorder)

    def quantize():
        packed, report = jgptq.quantize(model.apply, params, batches, grid=grid)
        jax.block_until_ready(packed)
        reports.append(report)

    def two_forward_passes(forward):
        for batch in batches * 2:
            forward(params, batch).block_until_ready()

    def solves():
        for w, hessian in recorder.given:
            jax.block_until_ready(jgptq.GPTQ().solve(w, hessian, grid))

    def sides(forward):
        return {"quantize": quantize, "forward_passes": lambda: two_forward_passes(forward), "solves": solves}

    with_compiling = {}
    for name in ("quantize", "forward_passes", "solves"):
        jax.clear_caches()
        with_compiling[name] = timed(sides(jax.jit(model.apply))[name])
        print(f"with compiling, {name}: {with_compiling[name]}", flush=True)

    warm = sides(jax.jit(model.apply))
    runs: dict[str, list[dict]] = {name: [] for name in warm}
    for run in warm.values():
        run()
    for _ in range(args.repeats):
        for name, run in warm.items():
            runs[name].append(timed(run))
            print(f"{name}: {runs[name][-1]}", flush=True)

    def ratios(seconds) -> dict:
        return {
            key: seconds("quantize", key) / (seconds("forward_passes", key) + seconds("solves", key))
            for key in ("wall_seconds", "cpu_seconds")
        }

    without_compiling = {"runs": runs}
    for summary in (statistics.median, min):
        ratio = ratios(lambda name, key, summary=summary: summary([run[key] for run in runs[name]]))
        without_compiling[summary.__name__] = {"quantize_over_unavoidable": ratio}
    report = reports[-1]
    return {
        "model": SMALL,
        "sequences": args.sequences,
        "sequence_length": 512,
        "batch_size": args.batch_size,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "method": "gptq",
        "weights": len(report.rows),
        "programs": report.programs,
        "with_compiling": {
            "runs": with_compiling,
            "quantize_over_unavoidable": ratios(lambda name, key: with_compiling[name][key]),
        },
        "without_compiling": without_compiling,
        "within_limit": without_compiling["median"]["quantize_over_unavoidable"]["wall_seconds"]
        < LIMITS["quantize_over_unavoidable"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32, help="of 512 tokens, to calibrate on")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--skip-quantize", action="store_true", help="all parts but that")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/executor-cpu.json")
    args = parser.parse_args()

    result = {
        "command": " ".join(["python", "benchmarks/executor.py", *sys.argv[1:]]),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
            "jgptq": jgptq.__version__,
        },
        "dtype": "float32",
        "limits": LIMITS,
        "load_average_at_start": os.getloadavg()[0],
        "segmenting": segmenting(args.repeats),
        "summing": summing(args.repeats),
    }
    if not args.skip_quantize:
        result["quantizing"] = quantizing(args)
        quantize = result["quantizing"]
        for name, part in {
            "with compiling": quantize["with_compiling"],
            "without compiling, median": quantize["without_compiling"]["median"],
            "without compiling, min": quantize["without_compiling"]["min"],
        }.items():
            ratio = part["quantize_over_unavoidable"]
            print(
                f"quantize over two forward passes and the solves, {name}: "
                f"{ratio['wall_seconds']:.2f} in wall seconds, {ratio['cpu_seconds']:.2f} in CPU seconds"
            )
    result["load_average_at_end"] = os.getloadavg()[0]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
