"""The command line on a tiny model: output, exit codes, one-line errors, nothing half-written."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jgptq
from jgptq import cli, program_cache
from jgptq.checkpoints.reading import LazyParameter
from jgptq.models import MODELS, LanguageModel
from jgptq.report import read_report

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TEXT = "Once upon a time there was a small cat. The cat sat on a mat and saw a big red ball.\n" * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a float model, its tokenizer and a text."""
    home = tmp_path_factory.mktemp("cli")
    (home / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=64, special_tokens=["<|endoftext|>"]))
    (home / "tokenizer").mkdir()
    tokenizer.save(str(home / "tokenizer" / "tokenizer.json"))
    config = MODELS["llama"].parse_config(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
    )
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    jgptq.save(home / "float", model, model.init(jax.random.key(0)), tokenizer_from=home / "tokenizer")
    return home


def quantize_arguments(home, out, *more):
    return [
        "quantize",
        str(home / "float"),
        str(out),
        "--calibration",
        str(home / "text.txt"),
        "--samples",
        "8",
        "--seq-len",
        "32",
        "--group-size",
        "16",
        "--quality",
        "fast",
        *more,
    ]


@pytest.fixture(scope="module")
def packed(home):
    more = ["--bits", "3", "--quality", "balanced", "--samples", "16", "--tune"]
    assert cli.main(quantize_arguments(home, home / "packed", *more)) == 0
    return home / "packed"


def test_quantize_writes_a_directory_that_loads_and_its_report(home, packed, capsys):
    model, params = jgptq.load(packed)
    tokens = np.arange(12, dtype=np.int32)[None]
    assert np.isfinite(model.apply(params, tokens)).all()
    kernel = params["model"]["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert (kernel.bits, kernel.group_size, kernel.in_features) == (3, 16, 44)
    report = json.loads((packed / cli.options.REPORT_FILE).read_text())
    assert len(report["rows"]) == 14
    assert (packed / cli.quantize.REPORT_PAGE).read_text().count("layers.1.self_attn.q_proj.kernel") > 0
    assert (packed / "tokenizer.json").is_file()
    assert not [path for path in home.iterdir() if "partial" in path.name]


def test_rules_are_taken_in_their_order_and_activations_may_wait_on_the_host(home, capsys):
    rules = ["--skip", "*.0.mlp.down_proj.*", "--rule", "*.down_proj.*", "8", "-1", "--skip", "*.q_proj.*"]
    assert cli.main(quantize_arguments(home, home / "rules", *rules, "--symmetric", "--offload", "host")) == 0
    layers = jgptq.load(home / "rules")[1]["model"]["layers"]
    assert not isinstance(layers[0]["mlp"]["down_proj"]["kernel"], jgptq.QuantizedTensor)
    assert not isinstance(layers[1]["self_attn"]["q_proj"]["kernel"], jgptq.QuantizedTensor)
    down, up = (layers[1]["mlp"][name]["kernel"] for name in ("down_proj", "up_proj"))
    assert (down.bits, down.group_size, down.symmetric) == (8, 44, True)
    assert (up.bits, up.group_size, up.symmetric) == (4, 16, True)


def test_bits_are_chosen_for_an_average(home, capsys):
    arguments = quantize_arguments(home, home / "mixed", "--average-bits", "4.5", "--rule", "*.0.mlp.*", "4", "-1")
    assert cli.main([*arguments, "--quality", "fast"]) == 0
    layers = jgptq.load(home / "mixed")[1]["model"]["layers"]
    kernels = {(number, name): kernel["kernel"] for number in (0, 1) for name, kernel in linears(layers[number])}
    assert {kernels[0, name].bits for name in ("gate_proj", "up_proj", "down_proj")} == {4}
    free = [kernel for (number, name), kernel in kernels.items() if number == 1 or name.endswith("o_proj")]
    assert len({kernel.bits for kernel in free}) > 1
    for number in (0, 1):
        assert len({kernels[number, name].bits for name in ("q_proj", "k_proj", "v_proj")}) == 1
    bits = sum(8 * (k.codes.nbytes + k.scales.nbytes) + k.zeros.size * k.bits for k in kernels.values())
    # Last words of 3-bit rows and short groups are filled up.
    assert bits / sum(k.in_features * k.out_features for k in kernels.values()) <= 4.5 * 1.05


def linears(layer):
    return [*layer["self_attn"].items(), *layer["mlp"].items()]


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(home, monkeypatch, capsys):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(LazyParameter, "__getitem__", read)
    before = sorted(home.iterdir())
    assert cli.main(quantize_arguments(home, home / "dry", "--dry-run")) == 0
    assert sorted(home.iterdir()) == before
    out = capsys.readouterr().out
    assert "14 weights to quantize" in out
    assert re.search(r"down_proj.kernel +44×32 +4 +16 ", out)
    assert re.search(r"^peak memory: about \d+ MB, at model.layers", out, re.M)
    assert re.search(r"^time: about \d+ s .* GFLOP/s", out, re.M)


def test_a_profile_goes_to_the_terminal_and_into_the_report(home, capsys):
    assert cli.main(quantize_arguments(home, home / "profiled", "--method", "rtn", "--profile")) == 0
    report = read_report((home / "profiled" / cli.options.REPORT_FILE).read_text())
    phases = {"trace", "load", "advance", "hessian", "solve", "pack", "write", "other"}
    assert phases <= set(dict(report.profile)) <= phases | {"compile", "targets"}
    out = capsys.readouterr().out
    assert all(re.search(rf"^ {phase} +\d+\.\d +\d+ %", out, re.M) for phase in (*phases, "save"))


def test_programs_are_kept_where_asked_and_the_callers_settings_stay(home, tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "LEAST_SECONDS", 0.0)
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in settings]
    jax.clear_caches()
    for run in range(2):
        kept = sorted(tmp_path.glob("programs/*-cache"))
        jax.clear_caches()
        arguments = quantize_arguments(home, home / f"kept{run}", "--method", "rtn")
        assert cli.main([*arguments, "--cache-dir", str(tmp_path / "programs")]) == 0
        assert [getattr(jax.config, name) for name in settings] == before
    assert len(kept) > 10
    assert sorted(tmp_path.glob("programs/*-cache")) == kept  # the second run made none


def test_without_being_asked_main_changes_no_setting_and_a_process_of_its_own_keeps_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    options = cli.commands._parser().parse_args(["eval", "model", "--text", "t"])
    with cli.commands._keeping_programs(options, own_process=False):
        assert jax.config.jax_compilation_cache_dir is None
    with cli.commands._keeping_programs(options, own_process=True):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jgptq" / "programs")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def told(tmp_path):
    """A directory that JAX was told to keep programs in, as JAX_COMPILATION_CACHE_DIR does."""
    settings = {"jax_compilation_cache_dir": str(tmp_path / "told"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    with program_cache._configured(settings):
        yield tmp_path / "told"


def test_none_switches_off_a_cache_that_jax_was_told_of(told):
    def compile_something(number, *more):
        with cli.commands._keeping_programs(cli.commands._parser().parse_args(["demo", *more]), own_process=True):
            jax.jit(lambda x: x * number)(1.0)
        return len([*told.glob("*-cache")])

    assert compile_something(3.25, "--cache-dir", "none") == 0
    assert compile_something(4.25) > 0
    assert jax.config.jax_enable_compilation_cache


def test_a_home_directory_is_looked_for_only_where_needed(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program_cache.default_directory() == tmp_path / "jgptq" / "programs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.warns(UserWarning, match="are not kept for the next run: Could not determine home") as warned:
        assert program_cache.default_directory() is None
    assert len(warned) == 1


def test_a_directory_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path):
    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(program_cache.tempfile, "TemporaryFile", refused)  # whoever may write everywhere runs tests too
    before = jax.config.jax_compilation_cache_dir
    expected = pytest.warns(UserWarning, match="are not kept for the next run: .*Permission denied")
    with expected as warned, program_cache.keeping_programs(tmp_path):
        assert jax.config.jax_compilation_cache_dir == before
    assert len(warned) == 1


def test_a_cache_that_cannot_be_made_is_a_warning(home, capsys):
    (home / "file").write_text("")
    arguments = quantize_arguments(home, home / "uncached", "--method", "rtn", "--cache-dir", str(home / "file" / "c"))
    assert cli.main(arguments) == 0
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_inspect_shows_every_weight_with_bits_bytes_and_error(packed, capsys):
    assert cli.main(["inspect", str(packed)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "layers.1.self_attn.q_proj.kernel" in line)
    cells = [cell.strip() for cell in line.split("│")]
    # 32 inputs of 3 bits in 3 words for each of 32 outputs; 2 groups of float16 scales and uint8 zeros
    assert cells[2:6] == ["32×32", "3", "16", f"{3 * 4 * 32 + 2 * 32 * 3:,}"]
    assert float(cells[6]) > 0


def test_convert_and_back_gives_the_same_file(home, packed, capsys):
    assert cli.main(["convert", str(packed), str(home / "other"), "--format", "orbax"]) == 0
    size = sum(file.stat().st_size for file in (home / "other").rglob("*") if file.is_file())
    assert f"other: orbax, {size:,} bytes on disk" in capsys.readouterr().out
    assert cli.main(["convert", str(home / "other"), str(home / "again"), "--format", "gptq"]) == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (home / "again" / file).read_bytes() == (packed / file).read_bytes()


def test_quantize_writes_the_format_asked_for(home):
    arguments = quantize_arguments(home, home / "compressed", "--format", "compressed-tensors", "--method", "rtn")
    assert cli.main([*arguments, "--symmetric", "--group-size", "-1"]) == 0
    config = json.loads((home / "compressed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert isinstance(jgptq.load(home / "compressed")[1]["model"]["layers"][0]["mlp"]["up_proj"]["kernel"].bits, int)


def test_quantize_scales_only_what_the_format_can_hold(home):
    arguments = quantize_arguments(home, home / "awq", "--method", "awq", "--quality", "fast")
    assert cli.main(arguments) == 0
    report = json.loads((home / "awq" / cli.options.REPORT_FILE).read_text())
    assert {row["method"] for row in report["rows"]} == {"awq"}
    params, before = (jgptq.load(home / name)[1]["model"]["layers"][0] for name in ("awq", "float"))
    norm, old = (params["input_layernorm"]["scale"] for params in (params, before))
    assert not np.allclose(norm, old)


def test_eval_agrees_with_the_library(home, packed, capsys):
    arguments = ["eval", str(packed), "--text", str(home / "text.txt"), "--seq-len", "32", "--json"]
    assert cli.main([*arguments, "--against", str(home / "float"), "--tokens", "500"]) == 0
    result = json.loads(capsys.readouterr().out)
    model, params = jgptq.load(packed)
    float_model, float_params = jgptq.load(home / "float")
    tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.strip("\n")).ids[:500]
    expected = jgptq.compare(model, params, float_model, float_params, ids, seq_len=32)
    asked = {"model": str(packed), "against": str(home / "float"), "text": str(home / "text.txt"), "seq_len": 32}
    chosen = {"protocol": "windows", "chat_template": False, "stride": None, "bos_token_id": None}
    versions = {"jgptq": jgptq.__version__, "jax": jax.__version__}
    assert result.items() >= (asked | chosen | versions).items()
    assert result["device"].startswith(jax.devices()[0].platform)
    assert result["kl"] == pytest.approx(expected.kl)
    assert result["perplexity"] == pytest.approx(expected.perplexity)
    assert result.items() >= {**dataclasses.asdict(expected), "text_tokens": 500}.items()
    assert cli.main([*arguments[:-1], "--tokens", "500"]) == 0
    assert f"{expected.perplexity:.5f}" in capsys.readouterr().out


def test_eval_strides_and_follows_the_papers_protocol(home, packed, capsys):
    def result(*more):
        assert (
            cli.main(["eval", str(packed), "--text", str(home / "text.txt"), "--seq-len", "32", "--json", *more]) == 0
        )
        return json.loads(capsys.readouterr().out)

    model, params = jgptq.load(packed)
    tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.strip("\n")).ids[:250]
    strided = result("--stride", "8", "--tokens", "250")
    assert strided["perplexity"] == pytest.approx(jgptq.perplexity(model, params, ids, seq_len=32, stride=8))
    assert (strided["tokens"], strided["text_tokens"], strided["stride"]) == (249, 250, 8)
    whole = np.array(tokenizer.encode(TEXT).ids)[:256].reshape(8, 32)
    paper = result("--protocol", "gptq", "--tokens", "287")
    assert paper["perplexity"] == pytest.approx(jgptq.perplexity(model, params, whole))
    assert (paper["tokens"], paper["text_tokens"], paper["protocol"]) == (8 * 31, 256, "gptq")


@pytest.fixture(scope="module")
def chat(home, packed):
    """The packed model with a chat template, and generation_config.json, beside conversations of its words."""
    shutil.copytree(packed, home / "chat")
    template = "{% for m in messages %}The {{ m.role }}: {{ m.content }}\n{% endfor %}"
    (home / "chat" / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}The cat: {% endif %}")
    messages = [{"role": "cat", "content": "a mat"}, {"role": "ball", "content": "Once upon a time"}]
    (home / "talk.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 40)
    return home / "chat"


def test_quantize_calibrates_on_conversations(home, chat, monkeypatch):
    """What reaches the solver is what the library makes of the same file."""
    seen = []

    def spy(f, params, batches, **options):
        seen.extend(np.asarray(tokens).tolist() for (tokens,) in batches)
        raise ValueError("enough")

    monkeypatch.setattr(cli.quantize, "quantize", spy)
    arguments = ["quantize", str(chat), str(home / "never"), "--calibration", str(home / "talk.jsonl"), "--no-pack"]
    arguments += ["--samples", "4", "--seq-len", "12", "--chat-template"]
    assert cli.main(arguments) == 2
    tokenizer = Tokenizer.from_file(str(chat / "tokenizer.json"))
    text = tokenizer.encode("The cat: a mat\nThe ball: Once upon a time\n").ids
    pieces = [text[start : start + 12] for start in range(len(text) - 11)]
    assert len(seen[0]) == 4
    assert all(window in pieces for window in seen[0])


def test_a_model_and_a_text_of_the_hub_are_found_in_its_cache_without_a_network(
    home, packed, tmp_path, monkeypatch, capsys
):
    """The cache is laid out by hand, as the hub's client does."""
    for kind, name, fill in (
        ("models", "owner--name", lambda place: shutil.copytree(packed, place)),
        ("datasets", "owner--texts", lambda place: (place / "a").mkdir(parents=True)),
    ):
        repository = tmp_path / f"{kind}--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        fill(repository / "snapshots" / ("0" * 40))
    lines = json.dumps({"text": TEXT})
    (tmp_path / "datasets--owner--texts" / "snapshots" / ("0" * 40) / "a" / "b.jsonl").write_text(lines)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = []
    for model, text in (("owner/name", "hf://datasets/owner/texts/a/b.jsonl"), (packed, home / "text.txt")):
        assert cli.main(["eval", str(model), "--text", str(text), "--tokens", "200", "--seq-len", "32", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] == found[1]
    assert cli.main(["inspect", "owner/other"]) == 2
    assert "fetching it from the hub failed" in capsys.readouterr().err


class Recorder(io.StringIO):
    """Standard output that notes what has been flushed, piece by piece."""

    def __init__(self):
        super().__init__()
        self.flushed = [""]

    def flush(self):
        self.flushed.append(self.getvalue())


def test_generate_prints_text_as_it_comes(packed, monkeypatch):
    output = Recorder()
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat sat\n"))
    assert cli.main(["generate", str(packed), "--prompt", "-", "--max-new-tokens", "12"]) == 0
    model, params = jgptq.load(packed)
    tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
    ids = jgptq.generate(model, params, tokenizer.encode("The cat sat").ids, max_new_tokens=12, on_token=len).tolist()
    assert output.getvalue() == tokenizer.decode(ids) + "\n"
    assert output.flushed[1].startswith("The cat sat")
    assert len(set(output.flushed)) > 6


def test_generate_answers_in_a_chat_until_the_models_own_end(chat, capsys):
    arguments = ["generate", str(chat), "--prompt", "a mat", "--chat", "--max-new-tokens", "10"]
    assert cli.main(arguments) == 0
    model, params = jgptq.load(chat)
    tokenizer = Tokenizer.from_file(str(chat / "tokenizer.json"))
    prompt = tokenizer.encode("The user: a mat\nThe cat: ").ids
    ids = jgptq.generate(model, params, prompt, max_new_tokens=10, on_token=len).tolist()
    begun = len(tokenizer.decode(prompt))
    assert capsys.readouterr().out == tokenizer.decode(ids)[begun:] + "\n"
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, ids[len(prompt)]]}))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids[: len(prompt) + 1])[begun:] + "\n"
    (chat / "generation_config.json").write_text('{"eos_token_id": "end"}')
    assert cli.main(arguments) == 2
    assert "eos_token_id is 'end'; it must be an integer or a list of them" in capsys.readouterr().err
    (chat / "generation_config.json").unlink()


def test_generate_prints_a_completion_and_seeds_repeat(packed, capsys):
    arguments = ["generate", str(packed), "--prompt", "The cat", "--max-new-tokens", "8", "--temperature", "1"]
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The cat")
    assert texts[0] == texts[1] != texts[2]


def test_generate_fills_the_context_by_default_and_no_more(packed, capsys):
    assert cli.main(["generate", str(packed), "--prompt", "a" * 60]) == 0
    model, params = jgptq.load(packed)
    tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
    prompt = tokenizer.encode("a" * 60).ids
    ids = jgptq.generate(model, params, prompt, max_new_tokens=64 - len(prompt), on_token=len).tolist()
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_a_reader_that_leaves_early_is_no_error(home, packed):
    command = [sys.executable, "-m", "jgptq.cli", "convert", str(packed), str(home / "early"), "--format", "gptq"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_json_is_valid_whatever_the_figures(home, packed, capsys, monkeypatch):
    arguments = ["eval", str(packed), "--text", str(home / "text.txt"), "--seq-len", "32", "--tokens", "40", "--json"]
    monkeypatch.setattr(cli.text, "perplexity", lambda *_, **__: float("inf"))
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["perplexity"] == "inf"


BAD = {
    "out exists": (lambda home: quantize_arguments(home, home / "float"), "float exists; choose a new directory"),
    "no model": (lambda home: ["inspect", str(home / "none")], "none is not a directory"),
    "no text": (lambda home: ["eval", str(home / "float"), "--text", "none.txt"], "none.txt is not a file"),
    "unknown bits": (
        lambda home: quantize_arguments(home, home / "o", "--bits", "5"),
        "argument --bits: invalid choice",
    ),
    "bad group": (
        lambda home: quantize_arguments(home, home / "o", "--group-size", "0"),
        "give a positive number, or -1",
    ),
    "bits given twice": (
        lambda home: quantize_arguments(home, home / "o", "--bits", "4", "--average-bits", "4"),
        "argument --average-bits: not allowed with argument --bits",
    ),
    "bits chosen for a format of one width": (
        lambda home: quantize_arguments(home, home / "o", "--average-bits", "4", "--format", "awq"),
        "awq",
    ),
    "tuning with nothing to judge by": (
        lambda home: quantize_arguments(home, home / "o", "--tune"),
        "--tune needs at least two batches of windows",
    ),
    "an average below all choices": (
        lambda home: quantize_arguments(home, home / "o", "--average-bits", "2"),
        "average_bits=2.0; with scales and zeros the smallest choice takes 3.1",
    ),
    "too little text": (lambda home: quantize_arguments(home, home / "o", "--samples", "9999"), "at most"),
    "already packed": (
        lambda home: ["quantize", str(home / "packed"), *quantize_arguments(home, home / "o")[2:]],
        "is already a QuantizedTensor",
    ),
    "no command": (lambda home: [], "the following arguments are required: command"),
    "unknown option": (lambda home: ["demo", "--fast"], "unrecognized arguments: --fast"),
    "negative seed": (lambda home: quantize_arguments(home, home / "o", "--seed", "-1"), "--seed -1; give 0 or"),
    "window beyond the context": (
        lambda home: quantize_arguments(home, home / "o", "--seq-len", "65"),
        "--seq-len 65, but the model's context is 64 tokens; give at most that",
    ),
    "out below a file": (
        lambda home: quantize_arguments(home, home / "text.txt" / "o"),
        "text.txt is no directory that you can write to; choose another place for o",
    ),
    "rule of words": (
        lambda home: quantize_arguments(home, home / "o", "--rule", "*", "four", "64"),
        "--rule * four 64; give a pattern, the bits and the group size",
    ),
    "rule of five bits": (
        lambda home: quantize_arguments(home, home / "o", "--rule", "*", "5", "64"),
        "bits=5; choose one of (2, 3, 4, 8)",
    ),
    "rule for groups of 0": (
        lambda home: quantize_arguments(home, home / "o", "--rule", "*", "4", "0"),
        "--rule * 4 0; give a positive number, or -1",
    ),
    "rule for no weight": (
        lambda home: quantize_arguments(home, home / "o", "--skip", "*.kernle"),
        "no weight matches the rule '*.kernle'; the nearest paths are",
    ),
    "conversations without their template": (
        lambda home: ["eval", str(home / "float"), "--text", str(home / "talk.jsonl")],
        "line 1): a conversation needs the model's chat template; ask for it (--chat-template)",
    ),
    "no chat template": (
        lambda home: ["generate", str(home / "float"), "--prompt", "a", "--chat"],
        "float has no chat template, neither chat_template.jinja nor",
    ),
    "the paper's protocol with a stride": (
        lambda home: [
            "eval",
            str(home / "float"),
            "--text",
            str(home / "text.txt"),
            "--protocol",
            "gptq",
            "--stride",
            "8",
        ],
        "--stride is no part of the GPTQ paper's protocol",
    ),
    "a stride beyond the window": (
        lambda home: ["eval", str(home / "float"), "--text", str(home / "text.txt"), "--stride", "65"],
        "stride=65; give between 1 and 64",
    ),
    "less than a window of the paper's": (
        lambda home: [
            "eval",
            str(home / "float"),
            "--text",
            str(home / "text.txt"),
            "--protocol",
            "gptq",
            "--tokens",
            "63",
        ],
        "--tokens 63 is less than one window; give at least 64",
    ),
    "bits that the format does not have": (
        lambda home: quantize_arguments(home, home / "o", "--bits", "3", "--format", "awq"),
        "'awq' checkpoints cannot hold these weights as they are: model.layers.0.mlp.down_proj and 13 more: 3 bits",
    ),
    "widths that the format does not have": (
        lambda home: quantize_arguments(home, home / "o", "--format", "compressed-tensors"),
        "model.layers.0.mlp.down_proj and 1 more: its last group is short: 44 inputs in groups of 16",
    ),
    "weights that the format cannot hold": (
        lambda home: ["convert", str(home / "packed"), str(home / "o"), "--format", "awq"],
        "'awq' checkpoints cannot hold these weights as they are: ",
    ),
    "a conversion over what is there": (
        lambda home: ["convert", str(home / "packed"), str(home / "float"), "--format", "orbax"],
        "float exists; choose a new name, or remove it first",
    ),
    "a dry run without bits": (
        lambda home: quantize_arguments(home, home / "o", "--average-bits", "3.5", "--dry-run"),
        "--dry-run cannot know what --average-bits would choose; give --bits",
    ),
    "a dry run of tuning": (
        lambda home: quantize_arguments(home, home / "o", "--tune", "--dry-run"),
        "--dry-run does not know what --tune takes; leave one of them out",
    ),
    "a profile of a dry run": (
        lambda home: quantize_arguments(home, home / "o", "--profile", "--dry-run"),
        "--dry-run runs nothing that --profile could measure; leave one of them out",
    ),
    "a trace of a dry run": (
        lambda home: quantize_arguments(home, home / "o", "--trace", str(home / "o"), "--dry-run"),
        "--dry-run runs nothing that --trace could measure; leave one of them out",
    ),
    "a dry run without its text": (
        lambda home: quantize_arguments(home, home / "o", "--calibration", "none.txt", "--dry-run"),
        "none.txt is not a file",
    ),
    "programs kept in no directory": (
        lambda home: ["demo", "--cache-dir", ""],
        "--cache-dir is empty; give a directory",
    ),
    "a prompt beyond the context": (
        lambda home: ["generate", str(home / "float"), "--prompt", "a" * 60, "--max-new-tokens", "64"],
        "exceed the model's context of 64",
    ),
    "a prompt of bytes that are no text": (
        lambda home: ["generate", str(home / "float"), "--prompt", "a\udcff"],
        "the prompt is not UTF-8 text",
    ),
    "a window of nothing": (
        lambda home: [
            "eval",
            str(home / "float"),
            "--text",
            str(home / "text.txt"),
            "--protocol",
            "gptq",
            "--seq-len",
            "0",
        ],
        "seq_len=0; give an integer of at least 2",
    ),
    "one token": (
        lambda home: ["eval", str(home / "float"), "--text", str(home / "text.txt"), "--tokens", "1"],
        "--tokens 1; give at least 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("packed", "chat")
def test_bad_input_is_one_line_and_exit_code_2(name, home, capsys):
    arguments, message = BAD[name]
    before = sorted(home.iterdir())
    try:
        code = cli.main(arguments(home))
    except SystemExit as exit:  # argparse leaves by itself
        code = exit.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not output.out
    assert sorted(home.iterdir()) == before


def test_a_corrupt_report_is_named(packed, capsys):
    report = packed / cli.options.REPORT_FILE
    text = report.read_text()
    report.write_text("{")
    assert cli.main(["inspect", str(packed)]) == 2
    assert "is not a report of jgptq" in capsys.readouterr().err
    report.write_text(text)


@pytest.mark.parametrize("command", ["demo", "quantize", "eval", "generate", "convert", "inspect"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: jgptq {command}" in capsys.readouterr().out


def test_a_note_on_a_weight_reaches_the_terminal(home, capsys, monkeypatch):
    arguments = quantize_arguments(home, home / "starved")
    arguments[arguments.index("--samples") + 1] = "1"
    assert cli.main(arguments) == 0
    assert "jgptq: warning:" in (errors := capsys.readouterr().err)
    assert "saw 32 tokens, fewer than its 44 inputs" in errors


@pytest.fixture
def listeners(monkeypatch) -> list:
    """Those of the events of compiling that a test registers, which JAX does not get."""
    registered = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", registered.append)
    return registered


@pytest.mark.parametrize(
    ("given", "set_to"),
    [
        ("", cli.memory.EMITTERS),
        ("--xla_a=1", f"{cli.memory.EMITTERS} --xla_a=1".strip()),
        ("--xla_cpu_use_fusion_emitters=true", "--xla_cpu_use_fusion_emitters=true"),
    ],
)
@pytest.mark.usefixtures("listeners")
def test_settings_of_the_process_leave_what_the_caller_set(given, set_to, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    cli.memory.spare_memory()
    assert os.environ["XLA_FLAGS"].strip() == set_to


def test_the_text_of_programs_goes_without_the_programs(monkeypatch, listeners, caplog):
    """A JAX that renames its caches fails here, and costs users nothing but memory."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    cli.memory.spare_memory()
    f = jax.jit(lambda x: x + 1)
    assert f(1.0) == 2
    caches = cli.memory.lowering_caches()
    assert len(caches) == 2
    listeners[0]("/jax/core/compile/backend_compile_duration", 1.0)
    assert not any(cache.cache_info().currsize for cache in caches)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert f(2.0) == 3
        assert not caplog.records
        assert f(jax.numpy.ones(3))[0] == 2
        assert caplog.records


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real models and texts are not beside the checkout")
def test_the_real_model_keeps_more_with_gptq_than_with_rtn_at_3_bits(tmp_path, capsys):
    """A real Llama whose intermediate width, 172, is no multiple of the group; KL on other text than calibration."""
    kl = {}
    for method in ("rtn", "gptq"):
        arguments = ["quantize", str(SHARED / "stories260K"), str(tmp_path / method), "--bits", "3"]
        arguments += ["--group-size", "32", "--calibration", str(SHARED / "tinystories_train_stories.txt")]
        arguments += ["--samples", "16", "--seq-len", "256", "--method", method, "--quality", "fast"]
        assert cli.main(arguments) == 0
        capsys.readouterr()
        arguments = ["eval", str(tmp_path / method), "--text", str(SHARED / "tinystories_valid_nl.txt")]
        arguments += ["--against", str(SHARED / "stories260K"), "--tokens", "4000", "--json"]
        assert cli.main(arguments) == 0
        kl[method] = json.loads(capsys.readouterr().out)["kl"]
    assert kl["gptq"] < 0.8 * kl["rtn"]  # 0.65 with 128 windows, on 20,000 tokens
