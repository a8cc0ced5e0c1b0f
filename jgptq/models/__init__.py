"""Language models in Flax NNX, named by Hugging Face's model_type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

__all__ = ["MODELS", "Architecture", "LanguageModel", "language_model"]


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def language_model(
    config: Mapping[str, Any], source: Path | None = None, *, tensors: int | None = None
) -> LanguageModel:
    """The model that a config.json, as a dict, describes, from `source`; ValueError if it is not known.

    tensors: how many the checkpoint has. A config of more layers is refused before anything is made of its size.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise ValueError(f"model_type={model_type!r} is not supported; known are {list(MODELS)}")
    for name in LAYER_COUNTS:
        if tensors is not None and type(config.get(name)) is int and config[name] > tensors:
            raise ValueError(f"{name}={config[name]}, but the checkpoint has {tensors} tensors; it is not this model's")
    architecture = MODELS[model_type]
    return LanguageModel(architecture=architecture, config=architecture.parse_config(config), source=source)
