"""One of two processes that quantize and save a model together: `python two_processes.py number port directory`."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jgptq
from jgptq.models.language_model import LanguageModel
from jgptq.models.llama import ARCHITECTURE, LlamaConfig

number, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
assert jax.process_count() == 2
assert len(jax.devices()) == 4

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
model = LanguageModel(architecture=ARCHITECTURE, config=CONFIG)
draw = np.random.default_rng(0).normal
params = jax.tree.map(lambda leaf: draw(size=leaf.shape, scale=0.2).astype(np.float32), model.parameter_shapes)
tokens = np.random.default_rng(1).integers(0, 64, (8, 16))
grid = jgptq.Grid(bits=4, group_size=16)
settings = {
    "grid": grid,
    "method": jgptq.GPTQ(scale_search=None, sweeps=0, targets=None),
    "loss": jgptq.next_token_loss,
}

mesh = jax.make_mesh((2, 2), ("data", "model"))
own = tokens[4 * number : 4 * number + 4]
batch = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), own)
packed, report = jgptq.quantize(model.apply, params, [batch], **settings)
divided = jgptq.shard(packed, mesh)
jgptq.save(directory / "packed", model, divided)
error, message = (FileExistsError, "exists; choose") if number == 0 else (RuntimeError, "process 0 could not write")
with pytest.raises(error, match=message):
    jgptq.save(directory / "packed", model, divided)

if number == 0:
    alone, expected = jgptq.quantize(model.apply, params, [tokens], **settings)
    pairs = list(zip(jax.tree.leaves(alone), jax.tree.leaves(packed), strict=True))
    different = np.concatenate([np.ravel(np.asarray(one) != np.asarray(both)) for one, both in pairs])
    # Sums differ in their last bits, and so may codes of which two are as good. Here none of 4,000 numbers does.
    assert np.mean(different) < 0.01, np.sum(different)
    for one, both in zip(expected.rows, report.rows, strict=True):
        assert np.isclose(one.relative_error, both.relative_error, rtol=1e-3), (one, both)
        assert one.tokens == both.tokens == tokens.size
    _, saved = jgptq.load(directory / "packed")
    for one, both in zip(jax.tree.leaves(saved), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(one, both)
print("equal", flush=True)
jax.distributed.shutdown()
os._exit(0)
