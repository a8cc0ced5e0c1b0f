"""GPTQ checkpoints through transformers' own loader, which hands them to optimum and gptqmodel's PyTorch kernel."""

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
)

import jgptq
from jgptq import Grid

torch = client("torch")
transformers = client("transformers")
for name in ("optimum", "gptqmodel"):
    client(name)

CASES = {
    "4 bits": ("llama", Grid(bits=4, group_size=32, symmetric=True), {}),
    "3 bits, asymmetric, act-order": ("llama", Grid(bits=3, group_size=32), {"act_order": True}),
    "8 bits, one group, biases": ("qwen2", Grid(bits=8, group_size=None, symmetric=True), {}),
    "2 bits, asymmetric, biases": ("opt", Grid(bits=2, group_size=32), {}),
    "4 bits, some modules in float": ("llama", Grid(bits=4, group_size=32), {"overrides": {"o_proj": None}}),
}


def read(directory):
    """What transformers makes of a directory: packed weights as (in, out) arrays by module, and logits of TOKENS."""
    # Other backends are compiled for minutes first; the fastest of them crashes on one group an output feature.
    config = transformers.GPTQConfig(bits=4, backend="gptq_torch")
    with their_warnings(), torch.inference_mode():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            directory, device_map="cpu", dtype=torch.float16, quantization_config=config
        )
        weights = {
            name: module.dequantize_weight().numpy()
            for name, module in loaded.named_modules()
            if hasattr(module, "qweight")
        }
        return weights, loaded(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_weights_we_wrote(name, tmp_path):
    model_type, grid, options = CASES[name]
    model, params = quantized_model(model_type, grid, **options)
    jgptq.save(tmp_path / "out", model, params)
    expected = dense_logits(model, params, tmp_path / "dense")
    weights, logits = read(tmp_path / "out")
    assert_same_weights(weights, dense_weights(model, params))
    assert_close_logits(logits, expected)
