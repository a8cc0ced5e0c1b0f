"""The demo: a small language model of Python code, quantized six ways on this machine, with what each way costs.

The model comes with the package (see examples/train_tiny_lm.py). It is calibrated on the standard library's training
modules and evaluated on the held-out ones, which it never saw.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from jgptq.calibration import batches, bos_token, encode, load_tokenizer
from jgptq.checkpoints import load
from jgptq.demo_text import read_modules
from jgptq.generate import generate
from jgptq.grid import Grid
from jgptq.perplexity import compare, perplexity
from jgptq.quantize import quantize
from jgptq.report import nbytes
from jgptq.solvers import METHODS, RTN

DEMO_MODEL = Path(__file__).parent / "demo_model"
BITS = (4, 3, 2)
GROUP_SIZE = 32
SAMPLES, SEQ_LEN, EVALUATED_TOKENS = 64, 256, 12_000
PROMPT = "    try:\n        return self._cache[key]\n    except"
NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the demo: perplexity and KL to the float model (nats a token) on held-out modules."""

    name: str
    perplexity: float
    kl: float
    nbytes: int
    seconds: float


def run(announce: Callable[[str], None]) -> tuple[list[Result], dict[str, str]]:
    """Results of float, RTN and GPTQ at 4, 3 and 2 bits, and a completion of PROMPT by the float and 4-bit model.

    announce: called with a line on what comes next.
    """
    model, stored = load(DEMO_MODEL)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    tokenizer = load_tokenizer(DEMO_MODEL)
    held_out = encode(read_modules(held_out=True), tokenizer)[:EVALUATED_TOKENS]
    calibration = batches(read_modules(held_out=False), tokenizer, samples=SAMPLES, seq_len=SEQ_LEN)
    bos = bos_token(tokenizer)

    announce("float: perplexity on held-out modules")
    started = time.perf_counter()
    ppl = perplexity(model, params, held_out, seq_len=SEQ_LEN, bos_token_id=bos)
    results = [
        Result(name="float", perplexity=ppl, kl=0.0, nbytes=nbytes(stored), seconds=time.perf_counter() - started)
    ]
    four_bit = None
    for bits in BITS:
        for method in (RTN(), METHODS["gptq"]):
            announce(f"{method.name.upper()} at {bits} bits")
            started = time.perf_counter()
            grid = Grid(bits=bits, group_size=GROUP_SIZE)
            packed, _ = quantize(model.apply, params, calibration, grid=grid, method=method)
            seconds = time.perf_counter() - started
            if (bits, method.name) == (4, "gptq"):
                four_bit = packed
            cost = compare(model, packed, model, params, held_out, seq_len=SEQ_LEN, bos_token_id=bos)
            results.append(
                Result(
                    name=f"{method.name.upper()} {bits}-bit",
                    perplexity=cost.perplexity,
                    kl=cost.kl,
                    nbytes=_bytes_as_stored(packed),
                    seconds=seconds,
                )
            )
    announce("completions")
    prompt = tokenizer.encode(PROMPT).ids
    completions = {
        name: tokenizer.decode(generate(model, tree, prompt, max_new_tokens=NEW_TOKENS).tolist()[len(prompt) :])
        for name, tree in (("float", params), ("GPTQ 4-bit", four_bit))
    }
    return results, completions


def _bytes_as_stored(packed: Any) -> int:
    """Bytes as a checkpoint holds them: what was left in float has the two bytes a number it came with."""
    return nbytes(jax.tree.map(lambda leaf: leaf.astype(jnp.float16) if leaf.dtype == jnp.float32 else leaf, packed))


def table(results: list[Result]) -> Table:
    shown = Table(title="A language model of Python code, on standard-library modules it never saw")
    for column in ("", "perplexity", "KL to float (nats/token)", "bytes", "seconds"):
        shown.add_column(column, justify="right" if column else "left")
    for result in results:
        shown.add_row(
            result.name,
            f"{result.perplexity:.3f}",
            f"{result.kl:.4f}",
            f"{result.nbytes:,}",
            f"{result.seconds:.1f}",
        )
    return shown
