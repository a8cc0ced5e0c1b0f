"""Peak memory of `jgptq quantize` on Llamas of about 1 GB, as the operating system counts it.

    python benchmarks/memory.py                          # writes benchmarks/results/memory-cpu.json

Makes a float32 Llama on disk and quantizes it in a process of its own, through the command line: parameters read
lazily, finished weights in the journal, activations on the host, eight windows of 128 tokens. Two shapes of one size:

    hidden 1024, intermediate 2816, 24 layers            # the largest tensor has 11.5 MB, its Hessian 32 MB
    hidden  512, intermediate 1408, 90 layers            # 2.9 MB, 8 MB

with heads of 64, a key/value head for four, and the bundled tokenizer's vocabulary of 1024; plain GPTQ
(`--quality fast`). The first is measured again at the default quality, which carries the float model's activations
along and holds their moments, and without the settings that the command line makes for its process (see jgptq.cli).

The peak is ru_maxrss; VmHWM of /proc/<pid>/status, read every 20 ms, must agree. Both count every page the process had
in memory, also those of the Python, JAX and XLA libraries: a process that imports the same modules and compiles one
trivial function says how much that is. `net` is the peak less that and less the activations that wait on the host.
Linux only.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jgptq
from jgptq.models import MODELS, LanguageModel

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "jgptq" / "demo_model"
SHAPES = ((1024, 2816, 24), (512, 1408, 90))
SAMPLES, SEQ_LEN = 8, 128
COMMAND = [sys.executable, "-m", "jgptq.cli"]
PLAIN = [sys.executable, "-c", "import sys; from jgptq import cli; sys.exit(cli.main(sys.argv[1:]))"]
BASELINE = (
    "import jgptq.cli, jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready(); print('ready', flush=True); input()"
)


class Random:
    """A leaf that is made when it is read, always the same: normal, as at initialization; norms are ones."""

    def __init__(self, seed: int, leaf: jax.ShapeDtypeStruct):
        self.seed, self.shape, self.ndim = seed, leaf.shape, len(leaf.shape)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index):
        if self.ndim == 1:
            return np.ones(self.shape, self.dtype)[index]
        random = np.random.default_rng(self.seed)
        return (random.standard_normal(self.shape, np.float32) * np.float32(0.02))[index]


def make_model(directory: Path, hidden: int, intermediate: int, layers: int) -> int:
    """Writes the model; returns the bytes of its parameters."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256}
    config = MODELS["llama"].parse_config({"model_type": "llama", "vocab_size": 1024, **sizes, **heads})
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    leaves, tree = jax.tree.flatten(model.parameter_shapes)
    params = jax.tree.unflatten(tree, [Random(seed, leaf) for seed, leaf in enumerate(leaves)])
    jgptq.save(directory, model, params, tokenizer_from=TOKENIZER, max_shard_bytes=300_000_000)
    return sum(4 * math.prod(leaf.shape) for leaf in leaves)


def status(pid: int) -> dict[str, int]:
    """Bytes by field; {} for a process that has ended."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    fields = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line and line[0][:-1] in fields}


def libraries() -> dict[str, int]:
    """Memory of a process that did nothing but import the command line and compile a trivial function."""
    process = subprocess.Popen([sys.executable, "-c", BASELINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    now = status(process.pid)
    process.communicate(b"\n")
    return now


def measure(command: list[str]) -> dict:
    """Runs the command; its peak, and what its memory consisted of when the most of it was seen."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    largest, peak = {"VmRSS": 0}, 0
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        now = status(process.pid)
        largest = max(largest, now, key=lambda seen: seen.get("VmRSS", 0))
        peak = max(peak, now.get("VmHWM", 0))
        time.sleep(0.02)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with status {code}: {process.stderr.read().decode()}")
    return {
        "peak": 1024 * usage.ru_maxrss,
        "VmHWM_seen": peak,
        "at_the_largest_VmRSS_seen": largest,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def case(home: Path, shape: tuple[int, int, int], quality: str, program: list[str], baseline: int) -> dict:
    hidden, intermediate, layers = shape
    # Elsewhere, for a child's ru_maxrss starts with the memory of its parent.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        nbytes = pool.apply(make_model, (home / "model", *shape))
    command = [*program, "quantize", str(home / "model"), str(home / "out"), "--calibration", str(home / "text.txt")]
    command += ["--quality", quality, "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--offload", "host"]
    run = measure(command)
    # What waits on the host when it is most: the residual stream and the gated product, of all tokens.
    activations = 4 * SAMPLES * SEQ_LEN * (hidden + intermediate) * (1 if quality == "fast" else 2)
    return {
        "quality": quality,
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": layers,
        "process_settings": program is COMMAND,
        "model_bytes": nbytes,
        "quantized_bytes": sum(file.stat().st_size for file in (home / "out").glob("*.safetensors")),
        **run,
        "libraries": baseline,
        "activations": activations,
        "net": run["peak"] - baseline - activations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "memory-cpu.json")
    options = parser.parse_args()
    alone = libraries()
    cases = []
    cases_to_run = (
        (SHAPES[0], "fast", COMMAND),
        (SHAPES[1], "fast", COMMAND),
        (SHAPES[0], "balanced", COMMAND),
        (SHAPES[0], "fast", PLAIN),
    )
    for shape, quality, program in cases_to_run:
        with tempfile.TemporaryDirectory(prefix="jgptq-memory-") as name:
            home = Path(name)
            (home / "text.txt").write_text("\n".join(f.read_text() for f in sorted((ROOT / "jgptq").rglob("*.py"))))
            cases.append(case(home, shape, quality, program, alone["VmRSS"]))
        print("\n".join(f"{name:40} {value}" for name, value in cases[-1].items()), flush=True)
    result = {
        "command": "python benchmarks/memory.py",
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
            "jgptq": jgptq.__version__,
        },
        "dtype": "float32",
        "tokens": SAMPLES * SEQ_LEN,
        "libraries": alone,
        "cases": cases,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("in MB; net: the peak less what the libraries alone take, and less the activations")
    parts = ("model_bytes", "peak", "libraries", "activations", "net")
    print("".join(f"{name:>15}" for name in ("shape", "quality", "settings", *parts)))
    for row in cases:
        shape = ",".join(str(row[name]) for name in ("hidden", "intermediate", "layers"))
        made = "made" if row["process_settings"] else "none"
        print(
            "".join(
                f"{text:>15}" for text in (shape, row["quality"], made, *(f"{row[part] / 1e6:,.0f}" for part in parts))
            )
        )


if __name__ == "__main__":
    main()
