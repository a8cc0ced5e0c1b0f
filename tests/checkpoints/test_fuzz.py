"""Damaged checkpoints by the thousand: whatever the damage, one clear error or a model that loads.

Each case is a whole small checkpoint with a few random mutations, made of a seed; REGRESSIONS are seeds that once
failed. A load must not raise anything but ValueError or an OSError in one line, open files outside the checkpoint,
unpickle, start a process, or make the process grow.
"""

import contextlib
import json
import os
import resource
import shutil
import site
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import packing, tensor
from jgptq.models import MODELS, language_model

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# The same sizes as other architectures call them.
OTHER_NAMES = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "num_layers": 1,
    "num_heads": 2,
    "attention_types": [[["global"], 1]],
    "ffn_dim": 64,
}
# Mutated inputs for each kind of checkpoint.
CASES = {
    "float": 350,
    "gptq": 400,
    "gptq in order of activations": 350,
    "awq": 350,
    "compressed-tensors": 350,
    "gguf": 500,
    "orbax": 60,
}
GROWTH = 400 << 20

NASTY = [
    *(-1, 0, 1, 3, 5, 7, 31, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 - 1, 10**30, -(2**63)),
    *(0.5, -0.5, 1e308, float("nan"), float("inf")),
    *(True, False, None, "", "4", "gptq", "a" * 3000, "../../../etc/passwd", "/etc/passwd", "\x00", "é", "int32"),
    *([], {}, [1], [[[]]], {"a": {"b": 1}}, ["model"], [None], [2**63] * 3),
]
DEEP = "[" * 100_000

pack = jax.jit(packing.pack, static_argnames="bits")


def packed(keys, spec, *, bits=4, symmetric=False, permuted=False):
    random = np.random.default_rng(len(keys))
    shape, path = spec.shape, [str(key.key) for key in keys]
    if path[-1] != "kernel" or path[-2] == "lm_head":
        return jnp.asarray(random.normal(0, 0.1, shape), jnp.float16)
    groups = shape[0] // 32
    return tensor.QuantizedTensor(
        codes=pack(jnp.asarray(random.integers(0, 2**bits, shape), jnp.uint32), bits=bits),
        # Seven significant bits: a GGUF holds them exactly.
        scales=jnp.asarray(random.integers(64, 128, (groups, shape[1])) / 1024, jnp.float16),
        zeros=None if symmetric else jnp.asarray(random.integers(0, 2**bits, (groups, shape[1])), jnp.uint8),
        permutation=jnp.asarray(random.permutation(shape[0]).astype(np.int32)) if permuted else None,
        bits=bits,
        group_size=32,
        dtype=jnp.dtype("float16"),
        layout=tensor.Layout.dense(*shape),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undamaged checkpoints, by kind."""
    directory, model = tmp_path_factory.mktemp("whole"), language_model(CONFIG)

    def params(**options):
        return jax.tree_util.tree_map_with_path(lambda *leaf: packed(*leaf, **options), model.parameter_shapes)

    floats = jax.tree.map(lambda spec: jnp.ones(spec.shape, jnp.bfloat16), model.parameter_shapes)
    jgptq.save(directory / "float", model, floats, max_shard_bytes=4000)
    jgptq.save(directory / "gptq", model, params(symmetric=True), max_shard_bytes=4000)
    jgptq.save(directory / "gptq in order of activations", model, params(bits=3, permuted=True))
    jgptq.save(directory / "awq", model, params(), format="awq")
    jgptq.save(directory / "compressed-tensors", model, params(bits=8), format="compressed-tensors")
    jgptq.save(directory / "orbax", model, params(permuted=True), format="orbax")
    (directory / "gguf").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no tokenizer
        jgptq.save(directory / "gguf" / "model.gguf", model, params(), format="gguf")
    return directory


class Watch:
    """What the interpreter's audit hook saw while it was on; such a hook cannot be taken away."""

    seen: list | None = None
    allowed: tuple[str, ...] = ()

    def __call__(self, event, arguments):
        if self.seen is None:
            return
        if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "marshal.loads"):
            self.seen.append((event, str(arguments)))
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.seen.append((event, path))


WATCH = Watch()
# Where Python and its packages lie, which are imported when first needed, and what the machine tells of itself.
INSTALLED = (sys.prefix, sys.base_prefix, *site.getsitepackages(), sysconfig.get_paths()["stdlib"])
READABLE = (*INSTALLED, str(Path(jgptq.__file__).parents[1]), "/proc/", "/sys/", "/dev/", "/etc/localtime")


@pytest.fixture(scope="module", autouse=True)
def _hook():
    sys.addaudithook(WATCH)


@pytest.fixture(autouse=True)
def _as_users_run_it(without_type_checker):
    """Damage must meet the library's own checks."""


@contextlib.contextmanager
def watched(directory):
    WATCH.allowed, WATCH.seen = (str(directory), *READABLE), []
    try:
        yield
    finally:
        seen, WATCH.seen = WATCH.seen, None
    assert seen == []


def choice(random, sequence):
    return sequence[int(random.integers(len(sequence)))]


def mutate_json(value, random):
    """`value` with one entry anywhere in it changed, removed or added."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = choice(random, sorted(value))
        kind = random.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {str(choice(random, NASTY)): choice(random, NASTY)}
        if kind < 0.2:
            return {("x" + k if k == key else k): v for k, v in value.items()}
        return value | {key: mutate_json(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        index = int(random.integers(len(value)))
        return [*value[:index], mutate_json(value[index], random), *value[index + 1 :]]
    if isinstance(value, int) and random.random() < 0.4:
        return value + int(random.integers(-3, 4)) * choice(random, [1, 1, 32, 2**20])
    return choice(random, NASTY)


def damage_json(file, random):
    kind = random.random()
    if kind < 0.03:
        file.write_text(DEEP)
    elif kind < 0.12:
        damage_bytes(file, random)
    else:
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), random)))


def damage_bytes(file, random, within=None):
    """Bits flipped, a piece cut out or doubled, the end cut off."""
    content = bytearray(file.read_bytes())
    within = min(within or len(content), len(content))
    place, kind = int(random.integers(within)), random.random()
    if kind < 0.6:
        for _ in range(int(random.integers(1, 6))):
            content[int(random.integers(within))] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF, random.integers(256)]))
    elif kind < 0.75:
        del content[place:]
    elif kind < 0.87:
        del content[place : place + int(random.integers(1, 64))]
    else:
        content[place:place] = bytes(content[place : place + int(random.integers(1, 64))])
    file.write_bytes(content)


def damage_safetensors(file, random):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    kind = random.random()
    if kind < 0.2:
        return damage_bytes(file, random)
    if kind < 0.3:
        return damage_bytes(file, random, within=8 + length)
    if kind < 0.4:
        wrong = choice(random, [0, 1, length - 1, length + 8, len(content), 2**32, 2**63, 2**64 - 1])
        return file.write_bytes(wrong.to_bytes(8, "little") + content[8:])
    if kind < 0.6:  # the data alone
        data = bytearray(content)
        for _ in range(64):
            data[int(random.integers(8 + length, len(data)))] = int(random.integers(256))
        return file.write_bytes(data)
    header = json.loads(content[8 : 8 + length])
    name = choice(random, sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    if kind < 0.7:
        entry["dtype"] = choice(
            random, ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "X", ""]
        )
    elif kind < 0.8:
        entry["shape"] = choice(
            random, [[], [0], [2**63], [-1, 4], [1] * 60, entry["shape"][::-1], [2**32, 2**32], [2**40], ["a"]]
        )
    elif kind < 0.9:
        other = header[choice(random, sorted(set(header) - {"__metadata__"}))]
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = choice(
            random, [other["data_offsets"], [stop, start], [start, stop + 4], [-8, 8], [2**63, 2**64], [0, 2**62], [0]]
        )
    else:
        header = mutate_json(header, random)
    text = json.dumps(header).encode()
    return file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def damage(directory, random):
    """Mutates the one or two files of a checkpoint that chance picks."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    for file in random.choice(files, min(len(files), int(random.integers(1, 3))), replace=False):
        if random.random() < 0.02:
            file.unlink()
        elif file.suffix == ".json":
            damage_json(file, random)
        elif file.suffix == ".safetensors":
            damage_safetensors(file, random)
        elif file.suffix == ".gguf":
            damage_bytes(file, random, within=choice(random, [32, 400, 3000, None]))
        else:
            damage_bytes(file, random)


def complaint(load):
    """What `load` says; None if it loads. Anything but an error a user can act on goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def check(message, directory):
    if message is not None:
        assert "\n" not in message.strip(), message
        assert str(directory) in message, message


@pytest.mark.usefixtures("orbax_leavings")
@pytest.mark.parametrize("kind", CASES)
def test_a_damaged_checkpoint_is_refused_in_one_line_or_loads(kind, whole):
    outcomes, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(CASES[kind]):
        random = np.random.default_rng([seed, len(kind)])
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "model"
            shutil.copytree(whole / kind, directory)
            damage(directory, random)
            try:
                with watched(place):
                    message = complaint(lambda: jgptq.load(directory))  # noqa: B023 (called at once)
                check(message, directory)
            except BaseException as error:
                error.add_note(f"{kind}, seed {seed}")
                raise
            outcomes.append(message)
    refused = [message for message in outcomes if message is not None]
    assert len(refused) > len(outcomes) / 4, "the mutations do no damage"
    assert len(set(refused)) > len(refused) / 5, "the mutations are all alike"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH >> 10


@pytest.mark.parametrize("model_type", MODELS)
def test_a_damaged_config_is_refused_or_understood(model_type):
    """config.json alone, for every architecture; sizes far from any that a checkpoint has."""
    whole = language_model({**CONFIG, **OTHER_NAMES, "model_type": model_type}).config.to_dict()
    for seed in range(30):
        random = np.random.default_rng([seed, len(model_type)])
        mutated = mutate_json(mutate_json(whole, random), random)
        if not isinstance(mutated, dict):
            continue
        try:
            complaint(lambda: language_model(mutated, tensors=100).parameter_shapes)  # noqa: B023
        except BaseException as error:
            error.add_note(f"{model_type}, seed {seed}: {str(mutated)[:2000]}")
            raise
