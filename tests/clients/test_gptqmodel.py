"""GPTQ checkpoints and gptqmodel's PyTorch kernel on the CPU: it reads ours, and we read what it quantized."""

import contextlib

import jax
import numpy as np
import pytest
from small_models import (
    CONFIGS,
    TOKENS,
    VOCABULARY,
    assert_close_logits,
    assert_same_weights,
    client,
    dense_logits,
    dense_weights,
    is_packed,
    quantized_model,
    their_warnings,
    write_tokenizer,
)

import jgptq
from jgptq import Grid

torch = client("torch")
transformers = client("transformers")
gptqmodel = client("gptqmodel")


def read(directory):
    """What gptqmodel makes of a directory: its packed weights as (in, out) arrays by module, and logits of TOKENS."""
    with their_warnings(), torch.inference_mode():
        loaded = gptqmodel.GPTQModel.load(
            str(directory), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
        ).model
        weights = {
            name: module.dequantize_weight().numpy()
            for name, module in loaded.named_modules()
            if hasattr(module, "qweight")
        }
        return weights, loaded(torch.tensor(TOKENS)).logits.float().numpy()


CASES = {
    "4 bits": ("llama", Grid(bits=4, group_size=32, symmetric=True), {}),
    "4 bits, asymmetric, act-order, head": ("llama", Grid(bits=4, group_size=32), {"act_order": True, "lm_head": True}),
    "3 bits, asymmetric, act-order, biases": ("qwen2", Grid(bits=3, group_size=32), {"act_order": True}),
    "3 bits, one group, Conv1D": ("gpt2", Grid(bits=3, group_size=None, symmetric=True), {}),
    "2 bits, asymmetric, one group": ("llama", Grid(bits=2, group_size=None), {}),
    "2 bits, act-order, biases": ("opt", Grid(bits=2, group_size=32, symmetric=True), {"act_order": True}),
    "8 bits, asymmetric": ("llama", Grid(bits=8, group_size=32), {}),
    "8 bits, one group, biases": ("qwen2", Grid(bits=8, group_size=None, symmetric=True), {}),
    "4 bits, asymmetric, experts": ("qwen3_moe", Grid(bits=4, group_size=32), {}),
    "mixed": (
        "llama",
        Grid(bits=4, group_size=32),
        {
            "overrides": {
                "q_proj": Grid(bits=8, group_size=32, symmetric=True),
                "k_proj": Grid(bits=2, group_size=64),
                "up_proj": Grid(bits=3, group_size=None),
                "o_proj": None,
            }
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_reads_the_weights_we_wrote(name, tmp_path):
    model_type, grid, options = CASES[name]
    model, params = quantized_model(model_type, grid, **options)
    jgptq.save(
        tmp_path / "out",
        model,
        params,
        tokenizer_from=write_tokenizer(tmp_path / "tokenizer"),
        max_shard_bytes=30_000 if "head" in name else 5_000_000_000,
    )
    expected = dense_logits(model, params, tmp_path / "dense")
    weights, logits = read(tmp_path / "out")
    assert_same_weights(weights, dense_weights(model, params))
    assert_close_logits(logits, expected)


QUANTIZED = {
    "4 bits": {"bits": 4, "sym": True},
    "4 bits, asymmetric": {"bits": 4, "sym": False},
    "4 bits, asymmetric, second version": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "3 bits, asymmetric, act-order": {"bits": 3, "sym": False, "desc_act": True},
    "2 bits, asymmetric": {"bits": 2, "sym": False},
    "8 bits, act-order, head": {"bits": 8, "sym": True, "desc_act": True, "lm_head": True},
    "4 bits, one group": {"bits": 4, "sym": True, "group_size": -1, "act_group_aware": False},
    "mixed": {"bits": 4, "sym": True, "dynamic": {r"-:.*o_proj$": {}, r".*down_proj$": {"bits": 8, "group_size": 64}}},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A float model as transformers saves it. Some outputs have no negative weight, and so a zero of 0."""
    directory = tmp_path_factory.mktemp("float") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIGS["llama"], initializer_range=0.1)
    with their_warnings(), torch.no_grad():
        model = transformers.LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:2].abs_()
        model.half().save_pretrained(directory)
    return write_tokenizer(directory)


def quantize(original, directory, **config):
    """`original` quantized by gptqmodel on the CPU, with the smallest calibration that it takes."""
    calibration = torch.randint(0, VOCABULARY, (8, 64), generator=torch.manual_seed(1))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in calibration]
    # Its other packer is compiled for half a minute first.
    config = gptqmodel.QuantizeConfig(**{"group_size": 32} | config, offload_to_disk=False, pack_impl="original")
    with their_warnings(), contextlib.chdir(directory.parent):  # it leaves logs where it runs
        model = gptqmodel.GPTQModel.load(str(original), config, device="cpu", dtype=torch.float32)
        model.quantize(batches, batch_size=8)
        model.save(str(directory))


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_gptqmodel_quantized_has_its_weights_and_runs_packed(original, name, tmp_path):
    quantize(original, tmp_path / "out", **QUANTIZED[name])
    weights, logits = read(tmp_path / "out")
    model, params = jgptq.load(tmp_path / "out", dtype="float16")
    assert_same_weights(dense_weights(model, params), weights)
    expected = dense_logits(model, params, tmp_path / "dense")
    for found in (logits, np.asarray(model.apply(params, TOKENS))):
        assert_close_logits(found, expected)
    if not QUANTIZED[name]["sym"]:
        assert any((leaf.zeros == 0).any() for leaf in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(leaf))
