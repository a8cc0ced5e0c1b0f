"""Options that several commands have: their words, and what is made of them."""

import argparse
import os
from pathlib import Path
from typing import Any

from jgptq.chat import ChatTemplate, load_chat_template

REPORT_FILE = "quantization_report.json"
TEXTS = "UTF-8 text, .jsonl with a text or messages a line, or such a file of a dataset, hf://datasets/owner/name/file"
MODEL = "model directory, GGUF file or hub id, float or packed"
CHAT_TEMPLATE = "put conversations, and texts as the user's message, into the model's own chat template"


def window_length(model: Any, seq_len: int | None) -> int:
    context = model.config.max_position_embeddings
    if seq_len is None:
        return min(context, 2048)
    if seq_len > context:
        raise ValueError(f"--seq-len {seq_len}, but the model's context is {context} tokens; give at most that")
    return seq_len


def check_writable(out: Path) -> None:
    """Refuses before hours of work what could not be written after them."""
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise PermissionError(f"{parent} is no directory that you can write to; choose another place for {out.name}")


def chat_template(options: argparse.Namespace, model: Any) -> ChatTemplate | None:
    return load_chat_template(model.source) if options.chat_template else None
