"""quantize: a model directory into a packed one."""

import argparse
import contextlib
import dataclasses
import fnmatch
import glob
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

import jgptq
from jgptq import calibration, documents
from jgptq.allocate import GRIDS, allocate, candidates
from jgptq.checkpoints import PACKINGS, Journal, fingerprint, load, remove_partial, save, size_and_hash
from jgptq.cli.memory import EMITTERS
from jgptq.cli.options import CHAT_TEMPLATE, REPORT_FILE, TEXTS, chat_template, check_writable, window_length
from jgptq.cli.signals import interruptible
from jgptq.cli.terminal import console, progress
from jgptq.estimate import estimate, packed_shape
from jgptq.finetune import tune
from jgptq.grid import BITS, Grid
from jgptq.perplexity import next_token_loss
from jgptq.quantize import Row, quantize
from jgptq.report import (
    estimate_lines,
    estimate_table,
    nbytes,
    profile_table,
    report_html,
    report_json,
    report_table,
)
from jgptq.rules import Options, Rule
from jgptq.solvers import AWQ, METHODS, PRESETS, QUALITIES, Method
from jgptq.tracing.graph import leaf_paths

REPORT_PAGE = "quantization_report.html"

LEFT_IN_FLOAT = ("lm_head.kernel", "embed_out.kernel", "*.gate.kernel")


def quantize_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="directory with config.json and safetensors, or a hub id")
    sub.add_argument("out", type=Path, help="directory to make; must not exist")
    sub.add_argument("--calibration", required=True, metavar="FILE", help=f"what to calibrate on: {TEXTS}")
    sub.add_argument("--chat-template", action="store_true", help=CHAT_TEMPLATE)
    sub.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="draw each window from a single document, leaving out those too short, rather than from all joined",
    )
    sub.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default 128)")
    sub.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens in a window (default: the model's context, at most 2048)"
    )
    sub.add_argument("--seed", type=int, default=0, help="which windows are drawn")
    _grid_options(sub)
    _method_options(sub)
    sub.add_argument(
        "--format",
        default="gptq",
        choices=tuple(PACKINGS),
        help="layout of the packed files (default gptq); convert knows gguf and orbax too",
    )
    sub.add_argument(
        "--offload", choices=("host",), help="keep activations in the host's memory; slower, for a device too small"
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what it would take: weights, bytes, peak memory and time; reads no weight and writes nothing",
    )
    sub.add_argument("--profile", action="store_true", help="say where the time went, phase by phase; takes a little")
    sub.add_argument(
        "--trace",
        metavar="DIR",
        help="write a trace of all that the device did, for Perfetto or TensorBoard; it is large",
    )


def _grid_options(sub: argparse.ArgumentParser) -> None:
    bits = sub.add_mutually_exclusive_group()
    bits.add_argument("--bits", type=int, choices=BITS, help="bits a weight (default 4)")
    bits.add_argument(
        "--average-bits",
        type=float,
        metavar="F",
        help="choose bits for each weight, and a group size of 32, 64 or 128 unless --group-size is given, by what its "
        "errors add to the loss: F bits a weight on average, with scales and zeros; takes memory for the whole model "
        "and its gradient at once",
    )
    sub.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale; -1: all (default 128)")
    sub.add_argument("--symmetric", action="store_true", help="fix the zero at mid-range rather than fit it")
    sub.add_argument(
        "--rule",
        dest="rules",
        action="append",
        nargs=3,
        metavar=("PATTERN", "BITS", "N"),
        help="other bits and group size for weights whose path fits a pattern such as '*.down_proj.*'; "
        "may be repeated, with --skip between: the first pattern that fits decides. Without one for them, the output "
        "head and routers of experts stay in float",
    )
    sub.add_argument(
        "--skip", dest="rules", action="append", nargs=1, metavar="PATTERN", help="leave such weights in float"
    )


def _method_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--method",
        default="gptq",
        choices=tuple(METHODS),
        help="gptq (default); awq: activation-aware scaling; rtn: round to nearest; obq: exact and slow, for a few "
        "hundred inputs",
    )
    sub.add_argument(
        "--quality",
        default="balanced",
        choices=QUALITIES,
        help="fast: plain GPTQ; balanced (default): more accurate, in up to three times the time; best: slower still",
    )
    sub.add_argument(
        "--tune",
        action="store_true",
        help="then train scales and norms towards the float model's distribution; for 3 bits and fewer; needs both "
        "models in memory",
    )


def quantize_command(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; choose a new directory, or remove it first")
    check_writable(options.out)
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}; give 0 or a positive integer")
    group_size = 128 if options.group_size is None else options.group_size
    grid = _grid(4 if options.bits is None else options.bits, group_size, options.symmetric, "--group-size")
    rules = [_rule(rule, options.symmetric) for rule in options.rules or ()]
    if options.dry_run:
        _check_dry_run(options)
    model, params = load(options.model, lazy=True)
    rules += _left_in_float(model)
    if options.dry_run:
        documents.locate(options.calibration)
        _check_holds(options.format, model, grid, rules)
        _print_estimate(options, model, params, grid, rules)
        return
    grids = _grids(options) if options.average_bits is not None else []
    for probe in _probes(model, grids, rules) if grids else [rules]:
        _check_holds(options.format, model, grid, probe)
    batches, drawn = _calibration(options, model)
    if grids:
        rules = _allocated(options, model, params, batches, grids, rules)
        _check_holds(options.format, model, grid, rules)
    settings = {"grid": grid, "method": _method(options.method, options.quality), "rules": rules}
    _solve_and_save(options, model, params, batches, settings, drawn)


def _calibration(options: argparse.Namespace, model: Any) -> tuple[list[Any], dict[str, Any]]:
    """Batches of windows, and everything that they depend on but the model."""
    tokenizer = calibration.load_tokenizer(model.source)
    texts = documents.locate(options.calibration)
    window = {
        "samples": options.samples,
        "seq_len": window_length(model, options.seq_len),
        "seed": options.seed,
        "pack": options.pack,
    }
    template = chat_template(options, model)
    batches = calibration.batches(texts, tokenizer, **window, chat_template=template)
    if options.tune and len(batches) < 2:
        raise ValueError("--tune needs at least two batches of windows, one of them to judge by; give --samples 16")
    return batches, window | {"chat template": options.chat_template, "calibration": texts}


def _solve_and_save(
    options: argparse.Namespace,
    model: Any,
    params: Any,
    batches: list[Any],
    settings: dict[str, Any],
    drawn: dict[str, Any],
) -> None:
    """From where an interrupted run of the same identity ended."""
    directory = options.out.absolute().parent / f".{options.out.name}.jgptq-unfinished"
    with interruptible() as check, progress() as bar:
        task = bar.add_task("reading the model's files", total=None, loss="")
        identity = _identity(model.source, settings, drawn)
        bar.update(task, description="tracing")
        tracing = jax.profiler.trace(options.trace) if options.trace else contextlib.nullcontext()
        with tracing, Journal(directory, identity, row_type=Row) as finished, _keeping(finished, directory):
            remove_partial(options.out)
            packed, report = quantize(
                model.apply,
                params,
                batches,
                **settings,
                progress=_follow(bar, task, len(finished), check),
                finished=finished,
                offload=options.offload,
                profile=options.profile,
            )
            if options.tune:
                bar.update(task, description="tuning")
                whole, floats = (jax.tree.map(lambda leaf: jnp.asarray(leaf[...]), tree) for tree in (packed, params))
                packed, tuning = tune(model.apply, floats, whole, batches)
            title = f"{Path(options.model).name}, quantized"
            files = {REPORT_FILE: report_json(report), REPORT_PAGE: report_html(report, title=title)}
            saving = time.perf_counter()
            try:
                save(options.out, model, packed, format=options.format, extra_files=files)
            except ValueError as error:
                kept = "all weights are finished and kept; the same command with another --format writes them"
                raise ValueError(f"{error}; {kept}") from error
            finished.remove()
            saving = time.perf_counter() - saving
    console().print(report_table(report))
    if options.profile:
        console().print(profile_table((*report.profile, ("save", saving))))
    if options.tune:
        print(f"tuning: KL to the float model {tuning.before:.4f} -> {tuning.after:.4f} on calibration text kept back")
    print(f"{options.out}: {nbytes(params):,} bytes -> {nbytes(packed):,} bytes")


def _check_dry_run(options: argparse.Namespace) -> None:
    """Refuses what a run without values can say nothing about."""
    if options.average_bits is not None:
        raise ValueError("--dry-run cannot know what --average-bits would choose; give --bits")
    if options.tune:
        raise ValueError("--dry-run does not know what --tune takes; leave one of them out")
    for option, given in (("--profile", options.profile), ("--trace", options.trace)):
        if given:
            raise ValueError(f"--dry-run runs nothing that {option} could measure; leave one of them out")


def _print_estimate(options: argparse.Namespace, model: Any, params: Any, grid: Grid, rules: Sequence[Rule]) -> None:
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}; give at least 1")
    size = calibration.windows_a_batch(options.samples)
    batch = jax.ShapeDtypeStruct((size, window_length(model, options.seq_len)), np.int32)
    found = estimate(
        model.apply,
        params,
        [batch] * (options.samples // size),
        grid=grid,
        method=_method(options.method, options.quality),
        rules=rules,
        offload=options.offload,
        kept=False,
    )
    console().print(estimate_table(found))
    for line in estimate_lines(found):
        print(line)


@contextlib.contextmanager
def _keeping(finished: Journal, directory: Path) -> Iterator[None]:
    """Lets an interruption say what is kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not finished:
            raise
        raise KeyboardInterrupt(
            f"{len(finished)} finished weights are kept in {directory}; the same command goes on from there"
        ) from interrupt


def _follow(
    progress: Progress, task: TaskID, continued: int, check: Callable[[], None]
) -> Callable[[Row, int, int], None]:
    """What `quantize` calls with each row; `continued` weights come from an earlier run."""

    def advance(row: Row, done: int, total: int) -> None:
        if continued and done == 1:
            progress.console.print(f"continuing: {continued} of {total} weights were finished", highlight=False)
        progress.update(task, description=row.path, loss=f"loss {row.loss:.3g}", completed=done, total=total)
        check()

    return advance


def _grid(bits: int, group_size: int, symmetric: bool, where: str) -> Grid:
    if group_size != -1 and group_size < 1:
        raise ValueError(f"{where} {group_size}; give a positive number, or -1 for all inputs")
    return Grid(bits=bits, group_size=None if group_size == -1 else group_size, symmetric=symmetric)


def _grids(options: argparse.Namespace) -> list[Grid]:
    """What --average-bits chooses from."""
    if options.group_size is None:
        return [dataclasses.replace(grid, symmetric=options.symmetric) for grid in GRIDS]
    return [_grid(bits, options.group_size, options.symmetric, "--group-size") for bits in BITS]


def _probes(model: Any, grids: Sequence[Grid], rules: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Rules that give each kernel one of the grids after another, and neighbours different ones."""
    kernels = [(path, leaf) for path, leaf in leaf_paths(model.parameter_shapes) if path.endswith(".kernel")]
    for shift in range(len(grids)):
        probe = list(rules)
        for number, (path, leaf) in enumerate(kernels):
            allowed = candidates(leaf.shape[-2], grids)
            grid = grids[allowed[(number + shift) % len(allowed)]]
            probe.append((glob.escape(path), Options(grid=grid)))
        yield probe


def _allocated(
    options: argparse.Namespace, model: Any, params: Any, batches: Any, grids: Sequence[Grid], rules: Sequence[Rule]
) -> list[Rule]:
    """The rules for --average-bits."""
    with Console(stderr=True).status("choosing the bits of each weight"):
        return allocate(
            model.apply,
            params,
            batches,
            average_bits=options.average_bits,
            grids=grids,
            method=options.method,
            rules=rules,
            loss=next_token_loss,
        )


def _left_in_float(model: Any) -> list[Rule]:
    """Rules for what checkpoints are expected to have in float: head and routers, for which few readers look packed."""
    paths = [path for path, _ in leaf_paths(model.parameter_shapes)]
    return [(pattern, None) for pattern in LEFT_IN_FLOAT if fnmatch.filter(paths, pattern)]


def _check_holds(format: str, model: Any, grid: Grid, rules: Sequence[Rule]) -> None:
    """Refuses before hours of work what the format could not hold after them: kernels by their shapes and grids."""
    weights = {}
    for path, leaf in leaf_paths(model.parameter_shapes):
        chosen = next((options for pattern, options in rules if fnmatch.fnmatchcase(path, pattern)), Options())
        if path.endswith(".kernel") and chosen is not None:
            weights[path.removesuffix(".kernel")] = packed_shape(*leaf.shape[-2:], chosen.grid or grid)
    if weights:
        PACKINGS[format].describe(weights, [], jax.numpy.float32)


def _method(name: str, quality: str) -> Method:
    """The formats written here have no place for scales of inputs."""
    method = PRESETS[name][quality]
    return dataclasses.replace(method, input_scales=False) if isinstance(method, AWQ) else method


def _rule(arguments: Sequence[str], symmetric: bool) -> Rule:
    """What came with one --rule or --skip, as `quantize` takes it."""
    pattern, *numbers = arguments
    if not numbers:
        return pattern, None
    try:
        bits, group_size = map(int, numbers)
    except ValueError as error:
        raise ValueError(f"--rule {' '.join(arguments)}; give a pattern, the bits and the group size") from error
    return pattern, Options(grid=_grid(bits, group_size, symmetric, f"--rule {pattern} {bits}"))


def _identity(model: Path, settings: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """Everything that the quantized model's bytes depend on."""
    device = jax.devices()[0]
    # XLA cuts sums on a CPU by the number of its cores: one and two cores gave different codes.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jgptq": jgptq.__version__,
        "jax": f"{jax.__version__} with jaxlib {jaxlib.__version__}",
        "device": f"{device.platform} {device.device_kind} on {platform.machine()}"
        + (f", {cores} cores" if device.platform == "cpu" else ""),
        # Batches are cut to fit.
        "device memory": (device.memory_stats() or {}).get("bytes_limit"),
        "matmul precision": jax.config.jax_default_matmul_precision,
        "64 bits": jax.config.jax_enable_x64,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").removeprefix(EMITTERS).strip(),
        **{f"the model's {name}": content for name, content in fingerprint(model).items()},
        **{name: repr(value) for name, value in settings.items()},
        **drawn,
        "calibration": size_and_hash(drawn["calibration"]),
    }
