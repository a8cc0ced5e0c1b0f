"""Wall time of quantizing a Llama of 97 million random weights on a CPU, against gptqmodel on the same tokens.

    python benchmarks/quantize.py                        # writes benchmarks/results/quantize-cpu.json, ten minutes
    python benchmarks/quantize.py --sides fast balanced  # jgptq alone
    python benchmarks/quantize.py --gptqmodel-python ~/clients/bin/python

gptqmodel 7.7.0 needs PyTorch and Defuser, which jgptq does not: it may be in an environment of its own, whose Python
--gptqmodel-python names (it need not have jgptq). Without one that imports gptqmodel, that side is left out.

Every side is a process of its own, one after another, on the same checkpoint and the same 32 windows of 512 tokens, 4
bits in groups of 128, asymmetric, output head left in float. What is timed is `jgptq.quantize`, and gptqmodel's
`quantize`, in float32: from parameters in memory to packed weights in memory, everything compiled in that time.
`compile_seconds` is what XLA's compiler took of that. jgptq's sides run a second time in a new process, `again`, which
finds the programs of the first on disk, as a second run of `jgptq quantize` does; there these seconds are mostly of
reading them. On a machine with other work the CPU seconds say more than the wall clock.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "jgptq" / "demo_model"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SIDES = ("fast", "balanced", "gptqmodel")
BITS, GROUP_SIZE = 4, 128
# Windows in one batch, for both.
BATCH_SIZE = 8


def make_model(directory: Path, sequences: int, layers: int) -> int:
    """Writes the checkpoint and the tokens; returns the number of parameters."""
    import jax

    import jgptq
    from jgptq.models import MODELS, LanguageModel

    config = MODELS["llama"].parse_config(LLAMA | {"num_hidden_layers": layers})
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    params = model.init(jax.random.key(0))
    jgptq.save(directory, model, params, tokenizer_from=TOKENIZER)
    tokens = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (sequences, 512))
    np.save(directory / "tokens.npy", tokens.astype(np.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def timed(run) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def by_jgptq(directory: Path, quality: str) -> dict:
    import jax

    import jgptq
    from jgptq.program_cache import keeping_programs

    compiling = []

    def listen(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    model, params = jgptq.load(directory)
    tokens = np.load(directory / "tokens.npy")
    batches = [tokens[start : start + BATCH_SIZE] for start in range(0, len(tokens), BATCH_SIZE)]
    grid = jgptq.Grid(bits=BITS, group_size=GROUP_SIZE)
    reports = []

    def quantize() -> None:
        packed, report = jgptq.quantize(model.apply, params, batches, grid=grid, quality=quality)
        jax.block_until_ready(packed)
        reports.append(report)

    with keeping_programs(directory / f"programs-{quality}"):
        times = timed(quantize)
    rows = reports[-1].rows
    return {
        **times,
        "compile_seconds": sum(compiling),
        "weights": len(rows),
        "mean_relative_error": sum(row.relative_error for row in rows) / len(rows),
        "versions": {"jax": jax.__version__, "jgptq": jgptq.__version__},
    }


def by_gptqmodel(directory: Path) -> dict:
    # It cannot start with fewer than two workers, and by itself takes one on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, len(os.sched_getaffinity(0)))))
    import gptqmodel
    import torch

    rows = [torch.tensor(row, dtype=torch.long)[None] for row in np.load(directory / "tokens.npy")]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    config = gptqmodel.QuantizeConfig(
        bits=BITS, group_size=GROUP_SIZE, sym=False, offload_to_disk=False, pack_impl="original"
    )
    model = gptqmodel.GPTQModel.load(str(directory), config, device="cpu", dtype=torch.float32)
    result = timed(lambda: model.quantize(data, batch_size=BATCH_SIZE))
    return {
        **result,
        "versions": {"gptqmodel": gptqmodel.__version__, "torch": torch.__version__},
    }


def run_side(python: str, directory: Path, side: str) -> dict:
    """One side in a process of its own; what it prints, logs mostly, is dropped."""
    result = directory / f"{side}.json"
    command = [python, __file__, "--side", side, "--directory", str(directory), "--output", str(result)]
    # gptqmodel writes its logs to the folder it is in.
    process = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{side} ended with status {process.returncode}: {process.stderr[-2000:]}")
    usage = json.loads(result.read_text())
    print(side, json.dumps(usage), flush=True)
    return usage


def can_import(python: str, module: str) -> bool:
    found = subprocess.run([python, "-c", f"import importlib.util as u; print(u.find_spec({module!r}))"], stdout=-1)
    return found.returncode == 0 and found.stdout.strip() != b"None"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--gptqmodel-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--sequences", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/quantize-cpu.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        theirs = args.side == "gptqmodel"
        result = by_gptqmodel(args.directory) if theirs else by_jgptq(args.directory, args.side)
        args.output.write_text(json.dumps(result))
        return

    from accuracy import command  # it needs jgptq, which gptqmodel's side may not have

    sides = list(args.sides)
    if "gptqmodel" in sides and not can_import(args.gptqmodel_python, "gptqmodel"):
        print(f"{args.gptqmodel_python} has no gptqmodel; see --gptqmodel-python", file=sys.stderr)
        sides.remove("gptqmodel")
    with tempfile.TemporaryDirectory(prefix="jgptq-quantize-") as name:
        directory = Path(name) / "model"
        parameters = make_model(directory, args.sequences, args.layers)
        load_average = os.getloadavg()[0]
        results = {}
        for side in sides:
            results[side] = run_side(args.gptqmodel_python if side == "gptqmodel" else sys.executable, directory, side)
            if side != "gptqmodel":
                results[side]["again"] = run_side(sys.executable, directory, side)
    record = {
        "command": command(sys.argv[1:], "quantize.py"),
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "model": LLAMA | {"num_hidden_layers": args.layers},
        "parameters": parameters,
        "tokens": 512 * args.sequences,
        "batch_size": BATCH_SIZE,
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "dtype": "float32",
        "load_average_at_start": load_average,
        "load_average_at_end": os.getloadavg()[0],
        "sides": results,
    }
    if "gptqmodel" in results:
        theirs = results["gptqmodel"]
        record["over_gptqmodel"] = {
            name: {key: own[key] / theirs[key] for key in ("seconds", "cpu_seconds")}
            for side, first in results.items()
            if side != "gptqmodel"
            for name, own in ((side, first), (f"{side}, again", first["again"]))
        }
        print(json.dumps(record["over_gptqmodel"], indent=1))
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
