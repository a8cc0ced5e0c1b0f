"""What runs on a GPU: values first, then solves, a model of 8 billion parameters, times and decoding. One command.

    python benchmarks/gpu.py                   # an NVIDIA H100 or H200; writes benchmarks/results/gpu-<device>.json
    python benchmarks/gpu.py --parts decoding  # some parts; the others stay as they are in the file
    python benchmarks/gpu.py --tiny            # small shapes, on any machine: only shows that the script runs

Each part is a process of its own, in the order of PARTS, and the result is written after each. A part that is not done
when its time is up is stopped, and what it had found is kept, as it is if the part fails; parts for which the budget
leaves no time are skipped. The result says so in `states`.

values: relative errors of products against float64; if they are wrong, there are no times. solves: first whether the
solver's kernel gives the codes of its loop; if not, models are quantized without it. quantize: benchmarks/llama8b.py at
quality "fast"; the same in 24 GB of the GPU's memory, with activations on the host; and both at the default quality.
times, decoding: see benchmarks/gpu_products.py.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import jgptq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_products  # noqa: E402
import gpu_solves  # noqa: E402

# Seconds that a part may take at most, in the order in which they run.
PARTS = {
    "values": 100,
    "solves": 100,
    "quantize": 120,
    "quantize_in_24_gb": 180,
    "times": 120,
    "quantize_balanced": 240,
    "decoding": 100,
    "quantize_balanced_in_24_gb": 300,
}
IN_PROCESS = {
    "values": gpu_products.values,
    "times": gpu_products.times,
    "decoding": gpu_products.decoding,
    "solves": gpu_solves.solves,
}
RESERVE = 15  # seconds that must be left for a part to begin


def part(name: str, options: Any) -> None:
    """One of the parts, in this process."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.tiny:
        raise SystemExit(f"this machine has {device.device_kind} and no GPU; give --tiny to see that the script runs")
    hopper = device.platform == "gpu" and str(device.compute_capability) == "9.0"
    found: dict[str, Any] = {}
    result = {"device": device.device_kind, "versions": versions(), name: found}
    save = functools.partial(write, options.output, result)
    save()
    IN_PROCESS[name](options, hopper, found, save)


def versions() -> dict[str, str]:
    """Of Python, of JAX and its plugins, and of PyTorch and GPTQModel if they are there."""
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    plugins = {name for name in found if name.startswith(("jax-cuda", "jax_cuda"))}
    names = [name for name in ("jax", "jaxlib", *sorted(plugins), "torch", "gptqmodel") if name in found]
    return {"python": platform.python_version(), "jgptq": jgptq.__version__} | {name: found[name] for name in names}


def write(path: Path, result: dict) -> None:
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(result, indent=1) + "\n")
    whole.replace(path)


def command(name: str, result: dict, tiny: bool) -> list[str]:
    """Without the file to write to."""
    if name in IN_PROCESS:
        arguments = ["gpu.py", "--one", name]
    else:
        arguments = ["llama8b.py", "--quality", "balanced" if "balanced" in name else "fast"]
        if name.endswith("24_gb"):
            arguments += ["--gigabytes", "24", "--offload", "host"]
        if "solves" in result["states"] and "agreement" not in result.get("solves", {}):
            arguments += ["--loop"]
    return [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:], *(["--tiny"] if tiny else [])]


def all_parts(options: Any) -> None:
    started = time.perf_counter()
    result: dict[str, Any] = {"command": "python benchmarks/gpu.py", "states": {}}
    path = options.output
    with tempfile.TemporaryDirectory(prefix="jgptq-gpu-") as folder:
        for name in options.parts:
            left = options.budget - (time.perf_counter() - started)
            output = Path(folder) / f"{name}.json"
            state = ran(name, result, left if options.tiny else min(left, PARTS[name]), output, options.tiny)
            if output.exists():
                found = json.loads(output.read_text())
                if path is None:
                    kind = found["device"].lower().replace(" ", "-")
                    path = ROOT / "benchmarks" / "results" / f"gpu-{kind}.json"
                if "device" not in result and set(options.parts) != set(PARTS) and path.exists():
                    result = json.loads(path.read_text())
                result |= {key: found[key] for key in ("device", "versions") if key in found}
                result[name] = found.get(name, found)
            result["states"][name] = state
            print(f"--- {name}: {state}", flush=True)
            if "device" not in result:
                raise SystemExit("nothing was found")
            write(path, result)
    print(json.dumps({"versions": result["versions"], "states": result["states"]}, indent=1))
    print(f"written to {path} in {time.perf_counter() - started:.0f} s")
    bad = ("failed", "stopped") if options.tiny else "failed"
    if any(state.startswith(bad) for state in result["states"].values()):
        raise SystemExit("a part failed; the result has what was found")


def ran(name: str, result: dict, limit: float, output: Path, tiny: bool) -> str:
    """Runs a part and says how it ended, or why it was skipped."""
    if limit < RESERVE:
        return "skipped: the budget was spent"
    if name in ("times", "decoding") and result["states"].get("values", "").startswith("failed"):
        return "skipped: values are wrong"
    if tiny and name.startswith("quantize_"):
        return "skipped: a test of the script has one such run"
    print(f"--- {name}, for at most {limit:.0f} s", flush=True)
    environment = dict(os.environ)
    if name.startswith("quantize"):
        # Models share compiled programs: the first one's seconds have the compiling.
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(output.parent / "programs")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    started = time.perf_counter()
    try:
        call = [*command(name, result, tiny), "--output", str(output)]
        status = subprocess.run(call, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    taken = f"{time.perf_counter() - started:.0f} s"
    return f"failed with status {status} after {taken}" if status else f"done in {taken}"


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes and few repeats, on any machine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--one", choices=IN_PROCESS, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=560, help="seconds for all parts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    full = {"loops": 20, "repeats": 3, "weights": 16, "group": 128, "tokens": 64, "vocab": 128256, "heads": 32}
    tiny = {"loops": 1, "repeats": 1, "weights": 2, "group": 32, "tokens": 2, "vocab": 64, "heads": 4}
    vars(options).update(tiny if options.tiny else full, rows=(1, 9) if options.tiny else gpu_products.ROWS)
    options.model = (64, 96, 1) if options.tiny else (4096, 14336, 32)
    return options


def main() -> None:
    options = parsed()
    if options.one:
        part(options.one, options)
    else:
        all_parts(options)


if __name__ == "__main__":
    main()
