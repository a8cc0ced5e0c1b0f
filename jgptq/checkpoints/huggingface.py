"""A Hugging Face model directory: config.json and safetensors files, checked before anything is read from them.

Nothing but JSON and safetensors is opened: no pickle, no code.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jgptq.checkpoints.tensor_file import StoredTensor, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# AutoGPTQ's files are gptq_model-4bit-128g.safetensors and the like.
HUB_FILES = (
    "*.json",
    "model*.safetensors",
    "gptq_model*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open model directory; `tensors` come from the files' headers alone."""

    directory: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the JSON and the safetensors headers of a model directory.

    `quantization` is config.json's quantization_config, or what older writers left in its place.
    Raises FileNotFoundError for what is missing and ValueError for what is broken, each naming the file.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json; give a Hugging Face model directory")
    config = read_json(directory / "config.json")
    quantization = _quantization(directory, config)
    tensors = _stored_tensors(_weights(directory, quantization or {}))
    return Checkpoint(directory=directory, config=config, quantization=quantization, tensors=tensors)


def _quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights are packed: quantization_config, a compression_config, or a file of AutoGPTQ or AutoAWQ."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and isinstance(found.get("quantization_config"), dict):  # by transformers 4
        found = {**found, **found["quantization_config"]}
    if found is None and (found := config.get("compression_config")) is not None:  # by llm-compressor's forerunner
        found = {**found, "quant_method": "compressed-tensors"} if isinstance(found, dict) else found
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if found is None and (directory / name).is_file():
            found = {"quant_method": method, **read_json(directory / name)}
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{directory / 'config.json'}: quantization_config is {found!r}; it must be an object")
    return found


def locate(path: str | Path) -> Path:
    """The directory `path` names; an `owner/name` that is no directory is fetched from the Hugging Face hub."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists() or not HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"{path} is not a directory; give a model directory, or a hub id such as owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{path} is not a directory; to fetch it from the hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # The hub's client passes on whatever its HTTP library raises.
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{path} is not a directory, and fetching it from the hub failed: {reason or type(error).__name__}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # Bad UTF-8, bad JSON, JSON nested without end.
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; it must hold an object")
    return content


def _weights(directory: Path, quantization: Mapping[str, Any]) -> Path:
    """The file of weights, or the index that names several.

    AutoGPTQ gave its files names of their own: the one that quantize_config.json has as model_file_base_name, or else
    the only safetensors file there is.
    """
    for name in (WEIGHTS, INDEX):
        if (directory / name).is_file():
            return directory / name
    files = [file for file in sorted(directory.glob("*.safetensors")) if not SHARD.search(file.name)]
    files = sorted(directory.glob("*.safetensors.index.json")) or files
    base = quantization.get("model_file_base_name")
    named = [file for file in files if file.name.removesuffix(".index.json") == f"{base}.safetensors"]
    if len(named or files) == 1:
        return (named or files)[0]
    others = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(directory.glob(pattern))]
    found = f" (found {', '.join(others)}, but only safetensors is read)" if others else ""
    if files:
        found = f" (found {', '.join(file.name for file in files)}; rename the right one)"
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}{found}")


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        return _tensors_of(file)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{file} has no weight_map from tensor names to file names")
    headers = {}
    for shard in sorted(set(weight_map.values())):
        name = PurePosixPath(shard)
        if name.is_absolute() or ".." in name.parts or "\\" in shard or name.suffix != ".safetensors":
            raise ValueError(f"{file} names {shard!r}; a shard must be a .safetensors file beside it")
        if not (file.parent / shard).is_file():
            raise FileNotFoundError(f"{file} names {shard}, which is missing; fetch it again")
        headers[shard] = _tensors_of(file.parent / shard)
    return {name: headers[shard][name] for name, shard in weight_map.items() if name in headers[shard]}


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(file)[0]
    except ValueError as error:
        raise ValueError(f"{error}; fetch it again") from error
