"""Language models in Flax NNX, named by Hugging Face's model_type."""

from jgptq.models import llama
from jgptq.models.language_model import Architecture, LanguageModel

MODELS: dict[str, Architecture] = {"llama": llama.ARCHITECTURE}

__all__ = ["MODELS", "Architecture", "LanguageModel"]
