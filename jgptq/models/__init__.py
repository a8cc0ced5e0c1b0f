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
    opt,
    phi3,
    qwen2,
    qwen3,
)
from jgptq.models.language_model import Architecture, LanguageModel

FILES = (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, gpt2, gpt_neo, gpt_neox, opt, bloom, falcon)
MODELS: dict[str, Architecture] = {file.ARCHITECTURE.model_type: file.ARCHITECTURE for file in FILES}

__all__ = ["MODELS", "Architecture", "LanguageModel"]
