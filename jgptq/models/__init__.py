"""Language models in Flax NNX, named by Hugging Face's model_type."""

from jgptq.models import gpt2, llama, mistral, qwen2, qwen3
from jgptq.models.language_model import Architecture, LanguageModel

FILES = (llama, mistral, qwen2, qwen3, gpt2)
MODELS: dict[str, Architecture] = {file.ARCHITECTURE.model_type: file.ARCHITECTURE for file in FILES}

__all__ = ["MODELS", "Architecture", "LanguageModel"]
