"""AWQ checkpoints that we wrote and gptqmodel's PyTorch kernel for them on the CPU, alone and through transformers."""

import pytest
from small_models import (
    TOKENS,
    assert_close_logits,
    assert_same_weights,
    client,
    dense_logits,
    dense_weights,
    quantized_model,
    their_warnings,
    write_tokenizer,
)

import jgptq
from jgptq import Grid

torch = client("torch")
transformers = client("transformers")
gptqmodel = client("gptqmodel")

CASES = {
    "asymmetric": ("llama", Grid(bits=4, group_size=32), {}),
    "symmetric, biases": ("qwen2", Grid(bits=4, group_size=32, symmetric=True), {}),
    "some modules in float": ("llama", Grid(bits=4, group_size=32), {"overrides": {"o_proj": None}}),
}


def by_gptqmodel(directory):
    return gptqmodel.GPTQModel.load(
        str(directory), device="cpu", backend=gptqmodel.BACKEND.AWQ_TORCH, dtype=torch.float16
    ).model


def by_transformers(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        device_map="cpu",
        dtype=torch.float16,
        quantization_config=transformers.AwqConfig(backend="torch_awq"),
    )


def packed_weights(loaded):
    """Packed modules' weights, (in, out): what they make of the unit vectors."""
    weights = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            bias, module.bias = module.bias, None  # the sum would be rounded
            weights[name] = module(torch.eye(module.in_features, dtype=torch.float16)).numpy()
            module.bias = bias
    return weights


@pytest.mark.parametrize("read", [by_gptqmodel, by_transformers])
@pytest.mark.parametrize("name", CASES)
def test_clients_read_the_weights_we_wrote(name, read, tmp_path):
    model_type, grid, options = CASES[name]
    model, params = quantized_model(model_type, grid, **options)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    jgptq.save(tmp_path / "out", model, params, format="awq", tokenizer_from=tokenizer)
    expected = dense_logits(model, params, tmp_path / "dense")
    with their_warnings(), torch.inference_mode():
        loaded = read(tmp_path / "out")
        weights, logits = packed_weights(loaded), loaded(torch.tensor(TOKENS)).logits.float().numpy()
    assert_same_weights(weights, dense_weights(model, params))
    assert_close_logits(logits, expected)
