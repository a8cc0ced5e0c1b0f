"""Config: a model's sizes and choices, as frozen dataclasses whose fields are named as in its config.json."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from jgptq.models import layers, rotary
from jgptq.models.json_fields import read_fields

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the configs of all models share; a field without a default must be in config.json.

    partial_rotary: whether the model may rotate a part of each head only.
    """

    model_type: ClassVar[str]
    transformers_class: ClassVar[str]
    partial_rotary: ClassVar[bool] = False

    vocab_size: int
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and not field.name.endswith("_token_id"):
                positive = type(value) is int and value > 0
                if not (positive or (value is None and field.type == int | None)):
                    raise ValueError(f"{field.name}={value!r}; give a positive integer")
            if field.name in ACTIVATION_FIELDS and value not in layers.ACTIVATIONS:
                raise ValueError(f"{field.name}={value!r} is not supported; choose one of {tuple(layers.ACTIVATIONS)}")
            if field.type is rotary.Rope and value.partial != 1 and not self.partial_rotary:
                raise ValueError(f"partial_rotary_factor is not supported in a {self.model_type}: heads turn in full")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a Hugging Face config.json; keys that change nothing here are ignored."""
        fields = dataclasses.fields(cls)
        required = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if config.get(name) is None]:
            raise ValueError(f"config.json of a {cls.model_type} needs {required}; {missing} is missing")
        plain = [field.name for field in fields if field.type is not rotary.Rope]
        options = read_fields(cls, config, plain)
        for field in fields:
            # null is a choice where the field allows it (no window, no soft cap), and not the default.
            if field.name in config and config[field.name] is None and type(None) in typing.get_args(field.type):
                options[field.name] = None
        if "rope" in {field.name for field in fields}:
            length = options.get("max_position_embeddings", getattr(cls, "max_position_embeddings", None))
            options["rope"] = rotary.Rope.from_config(config, length)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 read, and `from_dict` reads back to an equal config."""
        plain = [field.name for field in dataclasses.fields(self) if field.type is not rotary.Rope]
        return {
            "architectures": [self.transformers_class],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in plain},
            **(self.rope.to_config_json() if hasattr(self, "rope") else {}),
        }


def check_divides(config: Config, divisor: str, number: str) -> None:
    """ValueError unless one size of a config is a multiple of another."""
    if getattr(config, number) % getattr(config, divisor):
        raise ValueError(
            f"{number}={getattr(config, number)} must be a multiple of {divisor}={getattr(config, divisor)}"
        )


def check_layer_types(layer_types: tuple[str, ...], count: int) -> None:
    """ValueError unless every layer has a type that is known."""
    if len(layer_types) != count or not set(layer_types) <= set(LAYER_TYPES):
        raise ValueError(f"layer_types={layer_types!r}; give {count}, one a layer, each one of {LAYER_TYPES}")


def check_experts(chosen: int, count: int) -> None:
    """ValueError unless there are as many experts as a token goes through."""
    if chosen > count:
        raise ValueError(f"num_experts_per_tok={chosen}; give at most the number of experts, {count}")
