"""Decoding one token after another on a CPU: a packed Llama against the same model in float32, in one run.

    python benchmarks/decode.py                # 4 layers of 2048, writes benchmarks/results/decode-cpu.json
    python benchmarks/decode.py --layers 1 --hidden 256 --intermediate 512 --output /tmp/decode.json

Both models run in turn, a few steps each time, so that other work on the machine slows down both; the ratio is that of
the medians. Weights are random codes of 4 bits, asymmetric, group 128: their values do not change the speed. Memory is
that of the parameters, and what the compiled step takes besides.
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

import jgptq
from jgptq.models import MODELS
from jgptq.models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import random_packed  # noqa: E402

CONTEXT = 64


def llama(hidden: int, intermediate: int, layers: int, vocab: int = 8192, heads: int = 16) -> LanguageModel:
    fields = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return LanguageModel(architecture=MODELS["llama"], config=MODELS["llama"].parse_config(fields))


def decoder(model: LanguageModel, params: dict, batch: int) -> tuple:
    """(advance, bytes): advance(n) decodes n tokens greedily; bytes of the parameters and of the step's own arrays."""
    tokens = jnp.ones((batch, 8), jnp.int32)
    logits, cache = jax.jit(model.prefill, static_argnums=3)(params, tokens, jnp.full(batch, 8), CONTEXT)
    state = [jnp.argmax(logits, -1).astype(jnp.int32), jnp.full(batch, 8), cache]

    def step(params, token, position, cache):
        logits, cache = model.step(params, token, position, cache)
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.minimum(position + 1, CONTEXT - 1), cache

    started = time.perf_counter()
    compiled = jax.jit(step).lower(params, *state).compile()
    seconds = time.perf_counter() - started

    def advance(count: int) -> None:
        for _ in range(count):
            state[:] = compiled(params, *state)
        jax.block_until_ready(state)

    own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    return advance, {
        "parameter_bytes": own,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "decode-cpu.json")
    options = parser.parse_args()
    model = llama(options.hidden, options.intermediate, options.layers)
    sides, rows = {}, {}
    for name, grid in (("float32", None), ("packed", jgptq.Grid(bits=4, group_size=128))):
        params = random_packed.parameters(jax.random.key(0), model.parameter_shapes, grid=grid, dtype=jnp.float32)
        sides[name], rows[name] = decoder(model, params, 1)
        sides[name](2)
    seconds = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, advance in sides.items():
            started = time.perf_counter()
            advance(3)
            seconds[name].append((time.perf_counter() - started) / 3)
    for name, times in seconds.items():
        rows[name] |= {"seconds_a_token": statistics.median(times), "fastest": min(times)}
    plain, packed = rows["float32"], rows["packed"]
    result = {
        "command": "python benchmarks/decode.py",
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jgptq": jgptq.__version__},
        "model": {key: value for key, value in vars(options).items() if key not in ("output", "rounds")},
        "batch": 1,
        **rows,
        "speed_of_packed_over_float32": plain["seconds_a_token"] / packed["seconds_a_token"],
        "speed_of_packed_over_float32_fastest": plain["fastest"] / packed["fastest"],
        "memory_of_packed_over_float32": (packed["parameter_bytes"] + packed["temporary_bytes"])
        / (plain["parameter_bytes"] + plain["temporary_bytes"]),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
