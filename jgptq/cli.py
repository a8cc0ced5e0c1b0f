"""The command line: demo, quantize, eval, generate, convert, inspect.

Results go to stdout; progress and warnings to stderr. Bad input ends in one line on stderr and exit code 2.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import fnmatch
import glob
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

import jgptq
from jgptq import calibration, demo, documents
from jgptq.allocate import GRIDS, allocate, candidates
from jgptq.chat import ChatTemplate, load_chat_template
from jgptq.checkpoints import FORMATS, PACKINGS, Journal, fingerprint, load, remove_partial, save, size_and_hash
from jgptq.estimate import estimate, packed_shape
from jgptq.finetune import tune
from jgptq.generate import TextStream, generate
from jgptq.grid import BITS, Grid
from jgptq.perplexity import compare, count_scored, next_token_loss, perplexity
from jgptq.program_cache import default_directory, keeping_no_programs, keeping_programs
from jgptq.quantize import Options, Row, Rule, quantize
from jgptq.report import (
    estimate_lines,
    estimate_table,
    nbytes,
    profile_table,
    read_report,
    report_html,
    report_json,
    report_table,
    weights_table,
)
from jgptq.solvers import AWQ, METHODS, PRESETS, QUALITIES, Method
from jgptq.tracing.graph import leaf_paths

REPORT_FILE = "quantization_report.json"
REPORT_PAGE = "quantization_report.html"
MEMORY = "try a smaller --seq-len, or with quantize --offload host, which goes on from the finished weights"

TEXTS = "UTF-8 text, .jsonl with a text or messages a line, or such a file of a dataset, hf://datasets/owner/name/file"
MODEL = "model directory, GGUF file or hub id, float or packed"
CHAT_TEMPLATE = "put conversations, and texts as the user's message, into the model's own chat template"

CACHE = (
    "keep compiled programs here for the next run; none: nowhere (default: JAX_COMPILATION_CACHE_DIR, else "
    "jgptq/programs where the platform keeps caches); it has no size limit"
)

LEFT_IN_FLOAT = ("lm_head.kernel", "embed_out.kernel", "*.gate.kernel")

# JAX 0.11's XLA no longer knows the flag, and ends a process that sets it.
EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if arguments is None and options.command is _quantize:  # a process of its own, in which nothing is compiled yet
        _spare_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            with _keeping_programs(options, own_process=arguments is None):
                options.command(options)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"jgptq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:  # out of memory, mostly
        print(f"jgptq: error: {' '.join(str(error).split())}; {MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"jgptq: interrupted; {str(interrupt) or 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


def _keeping_programs(options: argparse.Namespace, *, own_process: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, compiled programs are kept where asked, or, in a process of our own, where the platform keeps such."""
    given = getattr(options, "cache_dir", None)
    if given == "":
        raise ValueError("--cache-dir is empty; give a directory, or none")
    if given == "none":
        return keeping_no_programs()
    if given is not None:
        return keeping_programs(Path(given))
    by_default = own_process and hasattr(options, "cache_dir") and not getattr(options, "dry_run", False)
    return keeping_programs(default_directory() if by_default else None)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"jgptq: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> _Parser:
    parser = _Parser(prog="jgptq", description="Quantize language models with GPTQ in JAX, and see what it cost.")
    parser.add_argument("--version", action="version", version=f"jgptq {jgptq.__version__}, jax {jax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Callable, options: Callable | None, help: str, example: str) -> None:
        sub = commands.add_parser(name, help=help, description=help, epilog=f"example: {example}")
        sub.set_defaults(command=function)
        if function not in (_convert, _inspect):  # which compile next to nothing
            sub.add_argument("--cache-dir", metavar="DIR", help=CACHE)
        if options:
            options(sub)

    command("demo", _demo, None, "Quantize the small model that comes with jgptq; needs no network.", "jgptq demo")
    command(
        "quantize",
        _quantize,
        _quantize_options,
        "Quantize a Hugging Face model directory into a new, packed one.",
        "jgptq quantize Llama-3.2-1B out --bits 4 --group-size 128 --calibration stories.txt; the same command goes on "
        "where one that was interrupted or killed ended",
    )
    command(
        "eval",
        _eval,
        _eval_options,
        "Perplexity on a text; with --against, KL and agreement with that model too.",
        "jgptq eval out --text held_out.txt --against Llama-3.2-1B",
    )
    command(
        "generate",
        _generate,
        _generate_options,
        "Complete a prompt, printing text as it comes.",
        'jgptq generate out --prompt "Once upon a time" --max-new-tokens 64',
    )
    command(
        "convert",
        _convert,
        _convert_options,
        "Write a model, float or packed, in another checkpoint format; what would change a weight is refused, or told.",
        "jgptq convert out out.gguf --format gguf",
    )
    command(
        "inspect",
        _inspect,
        _inspect_options,
        "A table of a model's weights: shape, bits, group, bytes and, if jgptq made it, error.",
        "jgptq inspect out",
    )
    return parser


def _quantize_options(sub: argparse.ArgumentParser) -> None:
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
    sub.add_argument(
        "--format",
        default="gptq",
        choices=tuple(PACKINGS),
        help="layout of the packed files (default gptq); convert knows gguf and orbax too",
    )
    sub.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default 128)")
    sub.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens in a window (default: the model's context, at most 2048)"
    )
    sub.add_argument("--seed", type=int, default=0, help="which windows are drawn")
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


def _eval_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--text", required=True, metavar="FILE", help=f"what to evaluate on: {TEXTS}")
    sub.add_argument("--chat-template", action="store_true", help=CHAT_TEMPLATE)
    sub.add_argument("--against", metavar="MODEL", help="the float model to compare with")
    sub.add_argument("--tokens", type=int, metavar="N", help="evaluate the first N tokens (default: all)")
    sub.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens in a window (default: the model's context, at most 2048)"
    )
    sub.add_argument("--stride", type=int, metavar="N", help="overlapping windows, N tokens apart; scores what is new")
    sub.add_argument(
        "--protocol",
        choices=("windows", "gptq"),
        default="windows",
        help="windows (default): documents packed, BOS in front of each window; gptq: the GPTQ paper's, the text as "
        "one, no BOS put in front of a window, the last one left out unless it is full",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")


def _generate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the text to complete; -: standard input")
    sub.add_argument(
        "--chat", action="store_true", help="take the prompt as a user's message and print the model's answer alone"
    )
    sub.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: 64, or what the model's context has room for"
    )
    sub.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    sub.add_argument("--top-k", type=int, metavar="K")
    sub.add_argument("--top-p", type=float, metavar="P")
    sub.add_argument("--seed", type=int, default=0)


def _convert_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)
    sub.add_argument("out", type=Path, help="directory, or file for gguf, to make; must not exist")
    sub.add_argument("--format", required=True, choices=FORMATS)


def _inspect_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)


def _demo(options: argparse.Namespace) -> None:
    console, status = _console(), Console(stderr=True)
    results, completions = demo.run(lambda line: status.print(f"[dim]{line} …[/dim]"))
    console.print(demo.table(results))
    for name, text in completions.items():
        console.print(f"\n[bold]{name}[/bold] completes:")
        console.print(demo.PROMPT + text, markup=False, highlight=False)


def _quantize(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; choose a new directory, or remove it first")
    _check_writable(options.out)
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
    tokenizer = calibration.load_tokenizer(model.source)
    texts = documents.locate(options.calibration)
    window = {
        "samples": options.samples,
        "seq_len": _window(model, options.seq_len),
        "seed": options.seed,
        "pack": options.pack,
    }
    template = _chat_template(options, model)
    batches = calibration.batches(texts, tokenizer, **window, chat_template=template)
    if options.tune and len(batches) < 2:
        raise ValueError("--tune needs at least two batches of windows, one of them to judge by; give --samples 16")
    if grids:
        rules = _allocated(options, model, params, batches, grids, rules)
        _check_holds(options.format, model, grid, rules)
    settings = {"grid": grid, "method": _method(options.method, options.quality), "rules": rules}
    directory = options.out.absolute().parent / f".{options.out.name}.jgptq-unfinished"
    with _interruptible() as check, _progress() as progress:
        task = progress.add_task("reading the model's files", total=None, loss="")
        identity = _identity(texts, model.source, settings, window | {"chat template": options.chat_template})
        progress.update(task, description="tracing")
        tracing = jax.profiler.trace(options.trace) if options.trace else contextlib.nullcontext()
        with tracing, Journal(directory, identity, row_type=Row) as finished, _keeping(finished, directory):
            remove_partial(options.out)
            packed, report = quantize(
                model.apply,
                params,
                batches,
                **settings,
                progress=_follow(progress, task, len(finished), check),
                finished=finished,
                offload=options.offload,
                profile=options.profile,
            )
            if options.tune:
                progress.update(task, description="tuning")
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
    _console().print(report_table(report))
    if options.profile:
        _console().print(profile_table((*report.profile, ("save", saving))))
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
    batch = jax.ShapeDtypeStruct((size, _window(model, options.seq_len)), np.int32)
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
    _console().print(estimate_table(found))
    for line in estimate_lines(found):
        print(line)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Makes SIGTERM a KeyboardInterrupt as Ctrl-C is, and yields what raises one that was lost.

    Python drops an exception from a garbage collector's callback, of which JAX has one: about one in forty got lost.
    """
    received = []

    def interrupt(number: int, frame: Any) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _spare_memory() -> None:
    """Process-wide settings for a low peak: benchmarks/memory.py says what they save.

    JAX 0.10's newer emitters of CPU code take 150 MB more to compile one solve, which is no faster for it. glibc raises
    the size from which a freed array goes back to the system to that of the largest array freed, unless it is set; what
    is smaller it keeps in an arena for each thread.
    """
    if EMITTERS and "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{EMITTERS} {os.environ.get('XLA_FLAGS', '')}"
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(M_ARENA_MAX, 1)
    caches = _lowering_caches()

    def spare(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            for cache in caches:
                cache.cache_clear()
        if hasattr(libc, "malloc_trim"):
            # What a compilation took is in pieces all over the heap, none of which glibc gives back by itself.
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(spare)


def _lowering_caches() -> list[Any]:
    """Where JAX keeps the text of each program besides what it compiled from it: at least 1.5 MB, of 40 programs.

    The public jax.clear_caches would drop the compiled programs as well. A JAX that has other names keeps the text.
    """
    names = (("jax._src.pjit", "_pjit_lower"), ("jax._src.interpreters.pxla", "_cached_lowering_to_hlo"))
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return [cache for cache in found if hasattr(cache, "cache_clear")]


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


def _identity(text: Path, model: Path, settings: dict[str, Any], window: dict[str, int]) -> dict[str, Any]:
    """Everything that the quantized model's bytes depend on."""
    device = jax.devices()[0]
    # XLA cuts sums on a CPU by the number of its cores: one and two cores gave different codes.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jgptq": jgptq.__version__,
        "jax": f"{jax.__version__} with jaxlib {jaxlib.__version__}",
        "device": f"{device.platform} {device.device_kind} on {platform.machine()}"
        + (f", {cores} cores" if device.platform == "cpu" else ""),
        "matmul precision": jax.config.jax_default_matmul_precision,
        "64 bits": jax.config.jax_enable_x64,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").removeprefix(EMITTERS).strip(),
        **{f"the model's {name}": content for name, content in fingerprint(model).items()},
        "calibration": size_and_hash(text),
        **{name: repr(value) for name, value in settings.items()},
        **window,
    }


def _eval(options: argparse.Namespace) -> None:
    model, params = load(options.model)
    tokens, settings = _evaluation_tokens(options, model, calibration.load_tokenizer(model.source))
    with _progress() as progress:
        task = progress.add_task("evaluating", total=None, loss="")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if options.against:
            reference, reference_params = load(options.against)
            result = dataclasses.asdict(
                compare(model, params, reference, reference_params, tokens, **settings, progress=advance)
            )
        else:
            result = {
                "tokens": count_scored(model, tokens, **settings),
                "perplexity": perplexity(model, params, tokens, **settings, progress=advance),
            }
    for name, given in (("perplexity", options.model), ("reference_perplexity", options.against)):
        if math.isnan(result.get(name, 0.0)):
            raise ValueError(f"the logits of {given} are NaN on this text; check its weights for NaN or infinity")
    asked = {name: getattr(options, name) for name in ("model", "against", "text", "protocol", "chat_template")}
    result = asked | {"text_tokens": tokens.size} | settings | result | _versions()
    if options.json:
        finite = {name: "inf" if value == math.inf else value for name, value in result.items()}  # JSON has no infinity
        print(json.dumps(finite, indent=1, allow_nan=False))
    else:
        for name, value in result.items():
            if value is not None and value is not False:
                print(f"{name.replace('_', ' '):22}", f"{value:.5f}" if isinstance(value, float) else value)


def _evaluation_tokens(
    options: argparse.Namespace, model: Any, tokenizer: Tokenizer
) -> tuple[np.ndarray, dict[str, int | None]]:
    """What to score, by the protocol asked for, and how."""
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens {options.tokens}; give at least 2")
    length = _window(model, options.seq_len)
    if options.protocol == "gptq":
        for name, given in (("--stride", options.stride), ("--chat-template", options.chat_template or None)):
            if given is not None:
                raise ValueError(f"{name} is no part of the GPTQ paper's protocol; leave it or --protocol gptq out")
        windows = calibration.gptq_windows(options.text, tokenizer, seq_len=length)
        count = len(windows) if options.tokens is None else options.tokens // length
        if count == 0:
            raise ValueError(f"--tokens {options.tokens} is less than one window; give at least {length}")
        return windows[:count], {"seq_len": length, "stride": None, "bos_token_id": None}
    texts = documents.read_documents(options.text)
    tokens = calibration.encode(texts, tokenizer, _chat_template(options, model))[: options.tokens]
    bos = calibration.bos_token(tokenizer)
    return tokens, {"seq_len": length, "stride": options.stride, "bos_token_id": bos}


def _chat_template(options: argparse.Namespace, model: Any) -> ChatTemplate | None:
    return load_chat_template(model.source) if options.chat_template else None


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {"jgptq": jgptq.__version__, "jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"}


def _generate(options: argparse.Namespace) -> None:
    model, params = load(options.model)
    params = model.arranged(params, donate=True)
    tokenizer = calibration.load_tokenizer(model.source)
    text = _prompt(options.prompt)
    if options.chat:
        message = {"role": "user", "content": text}
        text = load_chat_template(model.source).render([message], add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=not options.chat).ids
    room = max(model.config.max_position_embeddings - len(prompt), 1)
    stream = TextStream(tokenizer, prompt)
    if options.chat:
        stream.rest()  # the prompt is not printed
    generate(
        model,
        params,
        prompt,
        max_new_tokens=min(64, room) if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
        stop_token_ids=_stop_tokens(model),
        on_token=lambda tokens: print(stream.add(int(tokens[0])), end="", flush=True),
    )
    print(stream.rest())


def _prompt(given: str) -> str:
    try:
        text = sys.stdin.read().removesuffix("\n") if given == "-" else given
        text.encode()  # bytes of a command line that are no UTF-8 are halves of surrogate pairs here
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error}); convert it, with iconv for example") from error
    return text


def _stop_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end a text: config.json's, or of generation_config.json, which may add the end of an answer."""
    file = model.source / "generation_config.json"
    stop = model.config.eos_token_id
    if file.is_file():
        try:
            stop = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", stop)
        except (ValueError, RecursionError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object ({error}); fetch it again, or remove it") from error
    stop = () if stop is None else (stop,) if isinstance(stop, int) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(token, int) for token in stop):
        raise ValueError(f"{file}: eos_token_id is {stop!r}; it must be an integer or a list of them")
    return tuple(stop)


def _convert(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; choose a new name, or remove it first")
    _check_writable(options.out)
    remove_partial(options.out)
    model, params = load(options.model, lazy=True)
    with Console(stderr=True).status(f"writing {options.out}"):
        save(options.out, model, params, format=options.format)
    sizes = [file.stat().st_size for file in (options.out, *options.out.rglob("*")) if file.is_file()]
    print(f"{options.out}: {options.format}, {sum(sizes):,} bytes on disk")


def _inspect(options: argparse.Namespace) -> None:
    model, params = load(options.model, lazy=True)
    errors = {}
    report = model.source / REPORT_FILE
    if report.is_file():
        try:
            errors = {row.path: row.relative_error for row in read_report(report.read_text(encoding="utf-8")).rows}
        except ValueError as error:
            raise ValueError(f"{report} is {error}; or remove it to inspect without") from error
    _console().print(weights_table(params, errors))


def _console() -> Console:
    """stdout; where it is no terminal, wide enough for a table."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _window(model: Any, seq_len: int | None) -> int:
    context = model.config.max_position_embeddings
    if seq_len is None:
        return min(context, 2048)
    if seq_len > context:
        raise ValueError(f"--seq-len {seq_len}, but the model's context is {context} tokens; give at most that")
    return seq_len


def _check_writable(out: Path) -> None:
    """Refuses before hours of work what could not be written after them."""
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PermissionError(f"{parent} is no directory that you can write to; choose another place for {out.name}")


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


if __name__ == "__main__":
    sys.exit(main())
