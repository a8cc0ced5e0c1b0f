"""compressed-tensors checkpoints that we wrote, through transformers' own loader."""

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
client("compressed_tensors")

CASES = {
    "4 bits": ("llama", Grid(bits=4, group_size=32, symmetric=True), {}),
    "4 bits, asymmetric": ("llama", Grid(bits=4, group_size=32), {}),
    "3 bits, one group": ("llama", Grid(bits=3, group_size=None, symmetric=True), {}),
    "8 bits, asymmetric, biases": ("qwen2", Grid(bits=8, group_size=32), {}),
    "mixed": (
        "llama",
        Grid(bits=4, group_size=32, symmetric=True),
        {"overrides": {"q_proj": Grid(bits=8, group_size=None, symmetric=True), "o_proj": None}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_weights_we_wrote(name, tmp_path):
    model_type, grid, options = CASES[name]
    model, params = quantized_model(model_type, grid, **options)
    jgptq.save(tmp_path / "out", model, params, format="compressed-tensors")
    expected = dense_logits(model, params, tmp_path / "dense")
    ours = dense_weights(model, params)
    with their_warnings(), torch.inference_mode():
        # Left packed, its meta tensors of asymmetric weights have another shape than its files.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out",
            dtype=torch.float16,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=not grid.symmetric),
        )
        logits = loaded(torch.tensor(TOKENS)).logits.float().numpy()
        modules = {name: module for name, module in loaded.named_modules() if name in ours}
        weights = {name: module.weight.detach().numpy().T for name, module in modules.items()}
    assert_same_weights(weights, ours)
    assert_close_logits(logits, expected)
