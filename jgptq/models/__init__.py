"""Language models in Flax NNX, named by Hugging Face's model_type."""

from jgptq.models import (
    bloom,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neo,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from jgptq.models.language_model import Architecture, LanguageModel

FILES = (
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
    gemma,
    gemma2,
    gemma3,
    phi3,
    gpt2,
    gpt_neo,
    gpt_neox,
    opt,
    bloom,
    falcon,
)
MODELS: dict[str, Architecture] = {file.ARCHITECTURE.model_type: file.ARCHITECTURE for file in FILES}

__all__ = ["MODELS", "Architecture", "LanguageModel"]
