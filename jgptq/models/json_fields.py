"""Fields of a config dataclass from config.json, where types are whatever the writer left."""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any


def read_fields(cls: type, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that `values` gives and that are not null, each checked against its field's annotation.

    An integer does for a float, and a list for a tuple. ValueError names the field, its value and the types allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return {name: _read(fields[name], values[name]) for name in names if values.get(name) is not None}


def _read(field: dataclasses.Field, value: Any) -> Any:
    union = typing.get_args(field.type) if typing.get_origin(field.type) is not tuple else (field.type,)
    kinds = [typing.get_origin(kind) or kind for kind in union or (field.type,)]
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if isinstance(value, list | tuple) and tuple in kinds:
        (element, *_) = next(typing.get_args(kind) for kind in union if typing.get_origin(kind) is tuple)
        if not all(type(part) is element for part in value):
            raise ValueError(f"{field.name}={value!r}; give a list of {element.__name__}")
        return tuple(value)
    if type(value) not in kinds:
        allowed = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"{field.name}={value!r}; give {allowed}")
    return value
