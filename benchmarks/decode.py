"""Decoding one token after another on a CPU: a packed Llama against the same model in float32, in one run.

    python benchmarks/decode.py                # 4 layers of 2048, writes benchmarks/results/decode-cpu.json
    python benchmarks/decode.py --layers 1 --hidden 256 --intermediate 512 --output /tmp/decode.json

The packed model runs as it was loaded ("packed, layer by layer") and as `LanguageModel.arranged` orders it ("packed"):
projections of the same inputs joined, layers stacked under a scan, as `jgptq.generate` runs a deep one. All run in
turn, a few steps each time, so that other work on the machine slows down all; ratios are those of the medians. Weights
are random codes of 4 bits, asymmetric, group 128: their values do not change the speed. Memory is that of the
parameters, and what the compiled step takes besides. Then the seconds that tracing and compiling a step takes at
several depths, from shapes alone.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jgptq
from jgptq.models import MODELS
from jgptq.models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import random_packed  # noqa: E402

CONTEXT = 64
DEPTHS = (4, 16, 32)
GRID = jgptq.Grid(bits=4, group_size=128)
PACKED, APART = "packed", "packed, layer by layer"


def llama(
    hidden: int, intermediate: int, layers: int, vocab: int = 8192, heads: int = 16, kv_heads: int = 8
) -> LanguageModel:
    fields = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return LanguageModel(architecture=MODELS["llama"], config=MODELS["llama"].parse_config(fields))


def greedy(model: LanguageModel) -> Callable:
    """The next token of each sequence from the last."""

    def step(params, token, position, cache):
        logits, cache = model.step(params, token, position, cache)
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.minimum(position + 1, CONTEXT - 1), cache

    return step


def prefilled(model: LanguageModel, params: Any, batch: int) -> tuple:
    """Tokens, their positions and the cache after a prompt of 8."""
    tokens = jnp.ones((batch, 8), jnp.int32)
    logits, cache = model.prefill(params, tokens, jnp.full(batch, 8), CONTEXT)
    return jnp.argmax(logits, -1).astype(jnp.int32), jnp.full(batch, 8), cache


def compiled_step(model: LanguageModel, params: Any, state: tuple) -> tuple[Any, float]:
    """A decoding step of these arrays or shapes, and the seconds that tracing, lowering and compiling it took."""
    started = time.perf_counter()
    program = jax.jit(greedy(model), donate_argnums=3).lower(params, *state).compile()
    return program, time.perf_counter() - started


def decoder(model: LanguageModel, params: Any, batch: int) -> tuple:
    """(advance, facts): advance(n) decodes n tokens greedily; bytes of the parameters and of the step's own arrays."""
    state = list(jax.jit(lambda params: prefilled(model, params, batch))(params))
    program, seconds = compiled_step(model, params, state)

    def advance(count: int) -> None:
        for _ in range(count):
            state[:] = program(params, *state)
        jax.block_until_ready(state)

    return advance, {
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def compile_seconds(depth: int, hidden: int, intermediate: int) -> dict[str, float]:
    """Of a step of a packed model of so many layers, as loaded and as arranged."""
    model = llama(hidden, intermediate, depth)
    make = functools.partial(
        random_packed.parameters, jax.random.key(0), model.parameter_shapes, grid=GRID, dtype=jnp.float32
    )
    plain = jax.eval_shape(make)
    found = {}
    for name, params in ((APART, plain), (PACKED, jax.eval_shape(model.arranged, plain))):
        state = jax.eval_shape(lambda params: prefilled(model, params, 1), params)
        found[name] = round(compiled_step(model, params, state)[1], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="of the models that are compiled")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "decode-cpu.json")
    options = parser.parse_args()
    model = llama(options.hidden, options.intermediate, options.layers)
    sides, rows = {}, {}
    for name, grid in (("float32", None), (APART, GRID), (PACKED, GRID)):
        params = random_packed.parameters(jax.random.key(0), model.parameter_shapes, grid=grid, dtype=jnp.float32)
        if name == PACKED:
            params = model.arranged(params, donate=True)
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
    plain, packed, apart = rows["float32"], rows[PACKED], rows[APART]
    result = {
        "command": "python benchmarks/decode.py",
        "device": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jgptq": jgptq.__version__},
        "model": {key: value for key, value in vars(options).items() if key not in ("output", "rounds")},
        "batch": 1,
        **rows,
        "speed_of_packed_over_float32": plain["seconds_a_token"] / packed["seconds_a_token"],
        "speed_of_packed_over_float32_fastest": plain["fastest"] / packed["fastest"],
        "speed_of_packed_over_layer_by_layer": apart["seconds_a_token"] / packed["seconds_a_token"],
        "memory_of_packed_over_float32": (packed["parameter_bytes"] + packed["temporary_bytes"])
        / (plain["parameter_bytes"] + plain["temporary_bytes"]),
        "compile_seconds_at_depth": {
            depth: compile_seconds(depth, options.hidden, options.intermediate) for depth in options.depths
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
