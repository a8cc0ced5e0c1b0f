"""eval and generate: what a model makes of text."""

import argparse
import dataclasses
import json
import math
import sys
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

import jgptq
from jgptq import calibration, documents
from jgptq.chat import load_chat_template
from jgptq.checkpoints import load
from jgptq.cli.options import CHAT_TEMPLATE, MODEL, TEXTS, chat_template, window_length
from jgptq.cli.terminal import progress
from jgptq.generate import TextStream, generate
from jgptq.perplexity import compare, count_scored, perplexity


def eval_options(sub: argparse.ArgumentParser) -> None:
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


def eval_command(options: argparse.Namespace) -> None:
    model, params = load(options.model)
    tokens, settings = _evaluation_tokens(options, model, calibration.load_tokenizer(model.source))
    with progress() as bar:
        task = bar.add_task("evaluating", total=None, loss="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

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
    length = window_length(model, options.seq_len)
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
    tokens = calibration.encode(texts, tokenizer, chat_template(options, model))[: options.tokens]
    bos = calibration.bos_token(tokenizer)
    return tokens, {"seq_len": length, "stride": options.stride, "bos_token_id": bos}


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {"jgptq": jgptq.__version__, "jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"}


def generate_options(sub: argparse.ArgumentParser) -> None:
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


def generate_command(options: argparse.Namespace) -> None:
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
