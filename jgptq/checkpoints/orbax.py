"""A model in Orbax's layout: a directory with config.json, jgptq.json and Orbax's own `params`.

`params` is a flat tree: an array for each float parameter, by its dotted path; the arrays of a packed one by their
names (`model.layers.0.mlp.up_proj.kernel` -> codes, scales, ...). jgptq.json says what is static of packed ones.
Arrays are written and restored shard by shard, each process its own, as JAX has them laid out.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import grid as grids
from jgptq import packing
from jgptq.checkpoints.huggingface import read_json
from jgptq.checkpoints.layout import Placing, dotted, leaves_by_path
from jgptq.models import LanguageModel, language_model
from jgptq.tensor import Layout, QuantizedTensor

STATIC, PARAMS = "jgptq.json", "params"
FLOATS = ("float16", "bfloat16", "float32")
ZEROS = ("uint8", "float32")
VERSION = 1
ARRAYS = ("codes", "scales", "zeros", "permutation", "input_scales")

Spec = jax.ShapeDtypeStruct


def recognizes(path: Path) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    return (path / STATIC).is_file()


def save(directory: Path, config: Mapping[str, Any], params: Mapping) -> None:
    """Writes into an existing, empty directory; any layout and any bits can be held, and lazy leaves are all read."""
    import orbax.checkpoint

    leaves = {dotted(path): leaf for path, leaf in leaves_by_path(params).items()}
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedTensor)}
    content = {"format": "orbax", "version": VERSION, "packed": {path: _static(leaf) for path, leaf in packed.items()}}
    _write_json(directory / "config.json", config)
    _write_json(directory / STATIC, content)
    tree = {path: _arrays(leaf) if path in packed else jnp.asarray(leaf[...]) for path, leaf in leaves.items()}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / PARAMS).absolute(), tree)


def load(directory: Path, *, dtype: Any | None, placing: Placing) -> tuple[LanguageModel, dict]:
    """The model and its parameters, restored straight to where `placing` (path, shape and dtype) puts each array.

    ValueError in one line for whatever does not fit the model of config.json.
    """
    import orbax.checkpoint

    static = _read_static(directory / STATIC)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        stored = _stored(directory, checkpointer)
        try:
            model = language_model(read_json(directory / "config.json"), directory, tensors=len(stored))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from error
        paths = {dotted(path): shape for path, shape in leaves_by_path(model.parameter_shapes).items()}
        wanted = {path: _wanted(path, shape, static.get(path), stored.get(path)) for path, shape in paths.items()}
        _check(directory, wanted, stored)
        placed = {path: _placed(path, spec, placing) for path, spec in wanted.items()}
        try:
            arrays = checkpointer.restore((directory / PARAMS).absolute(), placed)
        except Exception as error:  # Orbax and TensorStore raise many kinds for files that are damaged
            raise ValueError(f"{directory / PARAMS} cannot be restored: {_first_line(error)}") from error
    leaves = {
        path: _packed(static[path], arrays[path], dtype) if path in static else _cast(arrays[path], dtype)
        for path in paths
    }
    return model, jax.tree_util.tree_map_with_path(
        lambda keys, _: leaves[dotted(key.key for key in keys)], model.parameter_shapes
    )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _static(weight: QuantizedTensor) -> dict[str, Any]:
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "dtype": jnp.dtype(weight.dtype).name,
        "layout": dataclasses.asdict(weight.layout),
    }


def _arrays(weight: QuantizedTensor) -> dict[str, Any]:
    arrays = {name: getattr(weight, name) for name in ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def _read_static(file: Path) -> dict[str, dict[str, Any]]:
    """What is static of packed parameters, checked; by path."""
    content = read_json(file)
    if content.get("format") != "orbax" or content.get("version") != VERSION:
        raise ValueError(
            f"{file} has format={content.get('format')!r}, version={content.get('version')!r}; this reads "
            f"'orbax', {VERSION}"
        )
    packed = content.get("packed")
    if not isinstance(packed, dict):
        raise ValueError(f"{file}: packed must be an object")
    try:
        return {path: _parse_static(static) for path, static in packed.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r} in what it says of packed parameters") from error


def _parse_static(static: Mapping[str, Any]) -> dict[str, Any]:
    bits, group_size, dtype = static["bits"], static["group_size"], static["dtype"]
    if (
        type(bits) is not int
        or bits not in grids.BITS
        or type(group_size) is not int
        or group_size < 1
        or dtype not in FLOATS
    ):
        raise ValueError(f"bits={bits!r}, group_size={group_size!r}, dtype={dtype!r}")
    layout = Layout(**{name: tuple(map(int, value)) for name, value in static["layout"].items()})
    roles = sorted(layout.batch_axes + layout.in_axes + layout.out_axes)
    if roles != list(range(len(layout.factors))) or min(layout.shape, default=1) < 1:
        raise ValueError(f"layout={static['layout']!r}")
    if math.prod(layout.factors) != math.prod(layout.shape):
        raise ValueError(f"layout={static['layout']!r}")
    return {"bits": bits, "group_size": group_size, "dtype": jnp.dtype(dtype), "layout": layout}


def _stored(directory: Path, checkpointer: Any) -> dict[str, Any]:
    """Shape and dtype of each array in `params`, from Orbax's metadata alone."""
    try:
        metadata = checkpointer.metadata((directory / PARAMS).absolute()).item_metadata
        if metadata is None:
            raise ValueError("its metadata or its arrays are missing or damaged")
        return jax.tree.map(lambda leaf: Spec(tuple(leaf.shape), jnp.dtype(leaf.dtype)), dict(metadata.tree))
    except Exception as error:
        raise ValueError(f"{directory / PARAMS} is no readable Orbax checkpoint: {_first_line(error)}") from error


def _wanted(path: str, shape: Spec, static: Mapping[str, Any] | None, stored: Any) -> Any:
    """What must be stored for a parameter: shapes by the model, dtypes as found where there is a choice."""
    if static is None:
        return Spec(shape.shape, _choice(stored, FLOATS))
    layout = static["layout"]
    stack = shape.shape[: len(shape.shape) - len(layout.shape)]
    if stack + layout.shape != shape.shape:
        return Spec(shape.shape, np.dtype(np.float32))  # which is not what is stored
    batch = (*stack, *layout.sizes(layout.batch_axes))
    found = stored if isinstance(stored, Mapping) else {}
    groups = (*batch, -(-layout.in_features // static["group_size"]), layout.out_features)
    words = (*batch, packing.word_count(layout.in_features, static["bits"]), layout.out_features)
    specs = {"codes": Spec(words, np.dtype(np.uint32)), "scales": Spec(groups, _choice(found.get("scales"), FLOATS))}
    if "zeros" in found:
        specs["zeros"] = Spec(groups, _choice(found["zeros"], ZEROS))
    if "permutation" in found:
        specs["permutation"] = Spec((*batch, layout.in_features), np.dtype(np.int32))
    if "input_scales" in found:
        specs["input_scales"] = Spec((*batch, layout.in_features), np.dtype(np.float32))
    return specs


def _choice(stored: Any, dtypes: tuple[str, ...]) -> np.dtype:
    return jnp.dtype(stored.dtype if isinstance(stored, Spec) and stored.dtype.name in dtypes else dtypes[-1])


def _check(directory: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    given, needed = _by_name(stored), _by_name(wanted)
    problems = [f"{name} is missing" for name in needed if name not in given]
    problems += [f"{name} is no parameter of this model" for name in given if name not in needed]
    problems += [
        f"{name} is {_spelled(given[name])}, not {_spelled(spec)}"
        for name, spec in needed.items()
        if name in given and (given[name].shape, given[name].dtype) != (spec.shape, spec.dtype)
    ]
    if problems:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(problems)}")


def _by_name(tree: Mapping[str, Any]) -> dict[str, Spec]:
    return {dotted(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _spelled(spec: Spec) -> str:
    return f"{jnp.dtype(spec.dtype).name}{list(spec.shape)}"


def _placed(path: str, spec: Any, placing: Placing) -> Any:
    def place(name: str, one: Spec) -> Spec:
        return Spec(one.shape, one.dtype, sharding=placing(name, one))

    if isinstance(spec, Spec):
        return place(path, spec)
    return {name: place(f"{path}.{name}", one) for name, one in spec.items()}


def _packed(static: Mapping[str, Any], arrays: Mapping[str, Any], dtype: Any | None) -> QuantizedTensor:
    own = {**static, "dtype": jnp.dtype(dtype or static["dtype"])}
    return QuantizedTensor(**{"zeros": None, "permutation": None} | dict(arrays) | own)


def _cast(array: jax.Array, dtype: Any | None) -> jax.Array:
    return array if dtype is None else array.astype(dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
