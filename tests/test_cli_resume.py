"""`jgptq quantize` killed and started again: the bundled model, processes of their own, real signals."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jgptq
from jgptq import cli
from jgptq.checkpoints import Journal
from jgptq.report import read_report, report_html

WEIGHTS = 35


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a model and a text, and a place for compiled programs, which the processes share."""
    home = tmp_path_factory.mktemp("resume")
    package = Path(jgptq.__file__).parent
    shutil.copytree(package / "demo_model", home / "model")
    (home / "text.txt").write_text("\n".join(file.read_text() for file in sorted(package.glob("*.py"))))
    return home


def arguments(home, out, *more):
    data = ["quantize", str(home / "model"), str(out), "--calibration", str(home / "text.txt")]
    data += ["--quality", "fast"]
    return [*data, "--samples", "8", "--seq-len", "64", "--group-size", "32", *more]


def start(home, out, *more):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(home / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "jgptq.cli", *arguments(home, out, *more)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def journal_of(out):
    return out.parent / f".{out.name}.jgptq-unfinished"


def finished(out):
    return len(list(journal_of(out).glob("*.safetensors")))


def stop_after(process, out, count, sent, delay):
    """Sends a signal when `count` weights have been finished, and some milliseconds; returns what stderr got."""
    while finished(out) < count and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(sent)
    return process.communicate()[1]


def without_seconds(report):
    """What two runs must agree on; `programs` counts what one process compiled."""
    rows = tuple(dataclasses.replace(row, seconds=0.0) for row in report.rows)
    return dataclasses.replace(report, rows=rows, seconds=0.0, programs=0)


@pytest.fixture(scope="module")
def whole(home):
    """The output of a run that nothing interrupted."""
    process = start(home, home / "whole")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing" not in errors
    assert f"{home / 'whole'}: " in output
    assert not journal_of(home / "whole").exists()
    return home / "whole"


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bytes(home, whole):
    """Equal to the bit in every file but the report, which must agree in everything but seconds."""
    out = home / "stopped"
    random = np.random.default_rng()
    had = 0
    stops = [(signal.SIGKILL, 2), (signal.SIGINT, 9), (signal.SIGTERM, 17)]
    for sent, count in stops:
        delay = random.uniform(0, 0.1)
        process = start(home, out)
        errors = stop_after(process, out, count, sent, delay)
        where = f"{sent.name} {delay} s after weight {count}: {errors}"
        assert ("continuing" in errors) == (had > 0), where
        if had:
            assert f"continuing: {had} of {WEIGHTS} weights were finished\n" in errors, where
        had = finished(out)
        assert WEIGHTS > had >= count, where
        assert not out.exists()
        if sent == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, where
            continue
        assert process.returncode == 130, where
        said = f"jgptq: interrupted; {had} finished weights are kept in {journal_of(out)}; the same command goes on"
        assert errors.splitlines()[-1].startswith(said), where
        assert "Traceback" not in errors
    process = start(home, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"continuing: {had} of {WEIGHTS} weights were finished\n" in errors
    assert not journal_of(out).exists()
    assert_same_output(out, whole)


def test_a_run_that_is_killed_while_it_saves_ends_in_the_same_bytes(home, whole):
    out = home / "saved"
    errors = stop_after(start(home, out), out, WEIGHTS, signal.SIGKILL, 0)
    assert finished(out) == WEIGHTS, errors
    (home / ".saved.0123.partial").mkdir(exist_ok=True)  # what a save that was killed leaves
    process = start(home, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"continuing: {WEIGHTS} of {WEIGHTS} weights were finished\n" in errors
    assert_same_output(out, whole)
    assert not list(home.glob(".saved*"))


def assert_same_output(out, whole):
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    reports = {cli.options.REPORT_FILE, cli.quantize.REPORT_PAGE}
    assert reports <= set(names)
    for name in set(names) - reports:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    report, wanted = (read_report((directory / cli.options.REPORT_FILE).read_text()) for directory in (out, whole))
    assert len(report.rows) == WEIGHTS
    assert without_seconds(report) == without_seconds(wanted)
    assert (out / cli.quantize.REPORT_PAGE).read_text() == report_html(report, title="model, quantized")


@pytest.fixture(scope="module")
def unfinished(home):
    out = home / "unfinished"
    stop_after(start(home, out), out, 3, signal.SIGKILL, 0)
    assert 3 <= finished(out) < WEIGHTS
    return out


@contextlib.contextmanager
def another(file):
    """The file with other content of the same meaning, or for tensors with another last byte."""
    content = file.read_bytes()
    tensors = file.suffix == ".safetensors"
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if tensors else content + b" ")
    yield
    file.write_bytes(content)


CHANGES = {
    "bits": (["--bits", "3"], [r"grid was \"Grid\(bits=4, .*\)\", now \"Grid\(bits=3, .*\)\""]),
    "group": (["--group-size", "16"], [r"grid was \".*group_size=32.*\", now \".*group_size=16.*\""]),
    "method": (["--method", "rtn"], [r"method was \"GPTQ\(.*\", now \"RTN\("]),
    "two": (["--samples", "4", "--seed", "1"], ["samples was 8, now 4; seed was 0, now 1;"]),
    "window": (["--seq-len", "32"], ["seq_len was 64, now 32"]),
    "rules": (["--skip", "*.0.*"], [r"rules was \"\[\]\", now \"\[\('\*\.0\.\*', None\)\]\""]),
    "text": ("text.txt", [r"calibration was \"\d+ bytes, sha256 \w{64}\", now \"\d+ bytes, sha256 \w{64}\""]),
    "model": ("model/model.safetensors", [r"the model's model\.safetensors was \"\d+ bytes"]),
    "config": ("model/config.json", [r"the model's config\.json was"]),
    "tokenizer": ("model/tokenizer.json", [r"the model's tokenizer\.json was"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_is_refused_and_told_what_differs(name, home, unfinished, capsys):
    change, messages = CHANGES[name]
    before = {file.name: file.stat().st_mtime_ns for file in journal_of(unfinished).iterdir()}
    if isinstance(change, str):
        with another(home / change):
            code = cli.main(arguments(home, unfinished))
    else:
        code = cli.main(arguments(home, unfinished, *change))
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("\n") == 1
    for message in messages:
        assert re.search(message, output.err), output.err
    assert output.err.count(" was ") == sum(message.count(" was") for message in messages)
    assert f"remove {journal_of(unfinished)} to start anew" in output.err
    assert {file.name: file.stat().st_mtime_ns for file in journal_of(unfinished).iterdir()} == before


def test_an_interruption_that_is_swallowed_stops_after_the_weight(home, capsys, monkeypatch):
    """A callback of the garbage collector, such as JAX has, can raise nothing."""

    def swallowing(*arguments, progress, **options):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        numbers = dict.fromkeys(("loss", "relative_error", "rtn_error", "damp", "seconds"), 0.0)
        counts = dict.fromkeys(("bits", "group_size", "nbytes", "tokens"), 1)
        progress(
            jgptq.Row(path="w", shape=(1,), method="rtn", symmetric=False, notes=(), **numbers, **counts), 1, WEIGHTS
        )
        raise AssertionError("it went on")

    monkeypatch.setattr(cli.quantize, "quantize", swallowing)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(arguments(home, home / "none")) == 130
    assert capsys.readouterr().err == "jgptq: interrupted; nothing was written\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_two_runs_to_one_output_are_refused(home, unfinished, capsys):
    identity = json.loads((journal_of(unfinished) / "identity.json").read_text())
    with Journal(journal_of(unfinished), identity, row_type=jgptq.Row):
        assert cli.main(arguments(home, unfinished)) == 2
    assert "is in use by another process; wait for it to end" in capsys.readouterr().err


def test_a_stop_before_the_first_weight_leaves_nothing(home, capsys, monkeypatch):
    def stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli.quantize, "quantize", stop)
    before = sorted(home.iterdir())
    assert cli.main(arguments(home, home / "none")) == 130
    assert capsys.readouterr().err == "jgptq: interrupted; nothing was written\n"
    assert sorted(home.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
