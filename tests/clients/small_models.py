"""Tiny models with random packed weights, and what the tests on clients ask of every client."""

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import jgptq
from jgptq import tensor
from jgptq.models import MODELS, LanguageModel

VOCABULARY = 128

# Widths that every client takes: multiples of 32. No two meet in one kernel, so that a wrong transposition shows.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3_moe": DECODER
    | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "num_hidden_layers": 1},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (2, 24)).astype(np.int32)

_from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))
_dequantize = jax.jit(jgptq.dequantize)


def client(name: str) -> Any:
    """The module `name`; where it is missing the test file is skipped, or fails if JGPTQ_CLIENTS=required."""
    # Clients would compile their kernels for minutes; what is tested is that they read the file.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    if importlib.util.find_spec(name) is None and os.environ.get("JGPTQ_CLIENTS") != "required":
        pytest.skip(f"client {name} is not installed", allow_module_level=True)
    with their_warnings():
        return importlib.import_module(name)


@contextlib.contextmanager
def their_warnings():
    """Around calls of a client: what it warns about is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantized_model(
    model_type: str,
    grid: jgptq.Grid,
    *,
    act_order: bool = False,
    lm_head: bool = False,
    overrides: Mapping[str, jgptq.Grid | None] | None = None,
    seed: int = 0,
) -> tuple[LanguageModel, dict]:
    """A tiny float16 model with random parameters, whose linear kernels are random codes on `grid`.

    act_order: groups of inputs that do not lie side by side. lm_head: is packed as well.
    overrides: another grid, or None to leave it in float, for kernels by the last part of their module's name.
    Every code and every zero, 0 and the largest included, occurs.
    """
    architecture = MODELS[model_type]
    config = architecture.parse_config({"model_type": model_type, **CONFIGS[model_type]})
    model = LanguageModel(architecture=architecture, config=config)
    grids = {"lm_head": grid if lm_head else None, "gate": None, **(overrides or {})}
    random = np.random.default_rng(seed)

    def parameter(keys, leaf):
        *_, module, name = (key.key for key in keys)
        own = grids.get(module, grid) if name == "kernel" else None
        if own is not None:
            return _random_weight(random, leaf.shape, own, act_order)
        # A router's choices must be clear, or float16 makes another one.
        spread = 0.1 if name in ("scale", "bias", "kernel") and module != "gate" else 1.0
        return jnp.asarray(random.normal(1.0 if name == "scale" else 0.0, spread, leaf.shape), jnp.float16)

    return model, jax.tree_util.tree_map_with_path(parameter, model.parameter_shapes)


def _random_weight(
    random: np.random.Generator, shape: tuple[int, ...], grid: jgptq.Grid, act_order: bool
) -> tensor.QuantizedTensor:
    *stack, in_features, out_features = shape
    length = grid.group_length(in_features)
    groups = -(-in_features // length)
    # Zeros are near the middle of the codes, as in real weights: far from it, logits say little.
    spread = max(1, grid.midpoint // 4)
    zeros = random.integers(grid.midpoint - spread, grid.midpoint + spread + 1, (*stack, groups, out_features))
    zeros[..., 0, :2] = 0, grid.max_code
    shuffled = random.permutation(np.arange(in_features) // length)
    codes = jnp.asarray(random.integers(0, 2**grid.bits, shape), jnp.uint32)
    scales = random.uniform(0.1, 0.2, (*stack, groups, out_features)) / grid.midpoint
    if grid.symmetric:  # the solver gives them either sign
        scales *= random.choice([-1.0, 1.0], scales.shape)
    return _from_codes(
        codes,
        jnp.asarray(scales, jnp.float32),
        None if grid.symmetric else jnp.asarray(np.minimum(zeros, grid.max_code), jnp.uint8),
        grid=grid,
        permutation=jnp.asarray(np.argsort(shuffled, kind="stable").astype(np.int32)) if act_order else None,
        layout=tensor.Layout.dense(in_features, out_features),
        dtype=jnp.float16,
    )


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, jgptq.QuantizedTensor)


def dense(params: Mapping) -> dict:
    """Packed leaves dequantized."""
    return jax.tree.map(lambda leaf: _dequantize(leaf) if is_packed(leaf) else leaf, params, is_leaf=is_packed)


def dense_weights(model: LanguageModel, params: Mapping) -> dict[str, np.ndarray]:
    """The (in, out) array that each packed module of the checkpoint stands for, by the module's name."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
        if is_packed(leaf):
            path, value = tuple(key.key for key in keys), np.asarray(_dequantize(leaf))
            names = model.architecture.stored_names(path, leaf.shape)
            found |= zip(names, value.reshape(len(names), *leaf.shape[-2:]), strict=True)
    return {name.removesuffix(".weight"): value for name, value in found.items()}


def dense_logits(model: LanguageModel, params: Mapping, directory: Path) -> np.ndarray:
    """Logits of TOKENS by transformers, in float32, on a plain checkpoint of the dequantized weights.

    To be asked for before a client runs: gptqmodel replaces transformers' experts in the whole process.
    """
    import torch
    import transformers

    jgptq.save(directory, model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense(params)))
    with their_warnings(), torch.inference_mode():
        reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return reference.eval()(torch.tensor(TOKENS)).logits.numpy()


def assert_same_weights(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> None:
    """The same modules are packed, and stand for exactly the same values."""
    assert set(theirs) == set(ours)
    for module, weight in ours.items():
        np.testing.assert_array_equal(theirs[module], weight, err_msg=module)


def assert_close_logits(theirs: np.ndarray, expected: np.ndarray) -> None:
    """Within 3e-3 relative: clients multiply and add in float16, with a relative error of 2^-11 = 5e-4 each time."""
    error = np.linalg.norm(theirs - expected) / np.linalg.norm(expected)
    assert error < 3e-3


def write_tokenizer(directory: Path) -> Path:
    """A tokenizer of whole words, as gptqmodel asks for one; returns `directory`."""
    directory.mkdir(exist_ok=True)
    words = {"<s>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    Tokenizer(WordLevel(words, unk_token="<s>")).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>", "unk_token": "<s>"}))
    return directory
