"""The command line: demo, quantize, eval, generate, convert, inspect.

Results go to stdout; progress and warnings to stderr. Bad input ends in one line on stderr and exit code 2.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from rich.console import Console

import jgptq
from jgptq import demo
from jgptq.checkpoints import FORMATS, load, remove_partial, save
from jgptq.cli.memory import spare_memory
from jgptq.cli.options import MODEL, REPORT_FILE, check_writable
from jgptq.cli.quantize import quantize_command, quantize_options
from jgptq.cli.terminal import console
from jgptq.cli.text import eval_command, eval_options, generate_command, generate_options
from jgptq.program_cache import default_directory, keeping_no_programs, keeping_programs
from jgptq.report import read_report, weights_table

MEMORY = "try a smaller --seq-len, or with quantize --offload host, which goes on from the finished weights"
CACHE = (
    "keep compiled programs here for the next run; none: nowhere (default: JAX_COMPILATION_CACHE_DIR, else "
    "jgptq/programs where the platform keeps caches); it has no size limit"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if arguments is None and options.command is quantize_command:  # a process of its own, nothing compiled yet
        spare_memory()
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
        quantize_command,
        quantize_options,
        "Quantize a Hugging Face model directory into a new, packed one.",
        "jgptq quantize Llama-3.2-1B out --bits 4 --group-size 128 --calibration stories.txt; the same command goes on "
        "where one that was interrupted or killed ended",
    )
    command(
        "eval",
        eval_command,
        eval_options,
        "Perplexity on a text; with --against, KL and agreement with that model too.",
        "jgptq eval out --text held_out.txt --against Llama-3.2-1B",
    )
    command(
        "generate",
        generate_command,
        generate_options,
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


def _demo(options: argparse.Namespace) -> None:
    out, status = console(), Console(stderr=True)
    results, completions = demo.run(lambda line: status.print(f"[dim]{line} …[/dim]"))
    out.print(demo.table(results))
    for name, text in completions.items():
        out.print(f"\n[bold]{name}[/bold] completes:")
        out.print(demo.PROMPT + text, markup=False, highlight=False)


def _convert_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)
    sub.add_argument("out", type=Path, help="directory, or file for gguf, to make; must not exist")
    sub.add_argument("--format", required=True, choices=FORMATS)


def _convert(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; choose a new name, or remove it first")
    check_writable(options.out)
    remove_partial(options.out)
    model, params = load(options.model, lazy=True)
    with Console(stderr=True).status(f"writing {options.out}"):
        save(options.out, model, params, format=options.format)
    sizes = [file.stat().st_size for file in (options.out, *options.out.rglob("*")) if file.is_file()]
    print(f"{options.out}: {options.format}, {sum(sizes):,} bytes on disk")


def _inspect_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help=MODEL)


def _inspect(options: argparse.Namespace) -> None:
    model, params = load(options.model, lazy=True)
    errors = {}
    report = model.source / REPORT_FILE
    if report.is_file():
        try:
            errors = {row.path: row.relative_error for row in read_report(report.read_text(encoding="utf-8")).rows}
        except ValueError as error:
            raise ValueError(f"{report} is {error}; or remove it to inspect without") from error
    console().print(weights_table(params, errors))
