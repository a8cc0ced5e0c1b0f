"""A model's own chat template: from a conversation to the text that the model was trained to read.

A template is a Jinja program among the model's files, so it is not trusted. It runs in Jinja's immutable sandbox, with
the functions and filters that transformers gives it: it reaches no file, no module and none of Python's internals, and
cannot change the messages. Its own size, the size of its output and the size of products are bounded; how long it runs
and what it concatenates are not.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_TEMPLATE = 1 << 20  # characters; those in use have some thousands
MAX_OUTPUT = 1 << 24  # characters of one conversation, and what a product in it may come to

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template's source, the names of the special tokens it may use (`bos_token` and so on), and its file."""

    source: str
    special_tokens: Mapping[str, str]
    file: Path

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        today: datetime.datetime | None = None,
    ) -> str:
        """The text of a conversation, special tokens included: encode it with add_special_tokens=False.

        messages: each with a "role" and a "content", both text; content may be None.
        add_generation_prompt: end with what begins an answer of the model.
        today: the date that the template sees; None: now.
        Raises ValueError for messages that are none, and if the template fails or refuses them.
        """
        check_messages(messages)
        written, pieces = 0, []
        try:
            for piece in self._compiled.generate(
                **self.special_tokens,
                messages=json.loads(json.dumps(messages)),  # plain data only: other objects have methods
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=lambda form: (today or datetime.datetime.now()).strftime(form),
            ):
                written += len(piece)
                if written > MAX_OUTPUT:
                    raise SecurityError(f"its output is longer than {MAX_OUTPUT:,} characters")
                pieces.append(piece)
        except Exception as error:  # A template is a program: it raises whatever it likes.
            raise ValueError(f"the chat template {self.file} failed: {error or type(error).__name__}") from error
        return "".join(pieces)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self.source)


def load_chat_template(directory: str | Path) -> ChatTemplate:
    """The chat template of a Hugging Face model directory, from chat_template.jinja or tokenizer_config.json.

    Raises ValueError if the directory has none, or if it is no Jinja template.
    """
    directory = Path(directory)
    config = _tokenizer_config(directory / TOKENIZER_CONFIG)
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            with open(file, encoding="utf-8") as handle:
                source = handle.read(MAX_TEMPLATE + 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); fetch it again") from error
    else:
        file, source = directory / TOKENIZER_CONFIG, _default(config.get("chat_template"))
    if not isinstance(source, str):
        raise ValueError(
            f"{directory} has no chat template, neither {TEMPLATE_FILE} nor chat_template in {TOKENIZER_CONFIG}; "
            f"use a model made for chat, or plain text"
        )
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"the chat template {file} has more than {MAX_TEMPLATE:,} characters; fetch the model again")
    template = ChatTemplate(source=source, special_tokens=_special_tokens(config), file=file)
    try:
        _ = template._compiled
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template {file} is not one that Jinja reads: {error}") from error
    return template


def check_messages(messages: Any) -> None:
    """ValueError unless these are the messages of a conversation, as `ChatTemplate.render` takes them."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages are {_kind(messages)}; give a list of objects with a role and a content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is {_kind(message)}; give an object with a role and a content")
        for field, allowed in (("role", str), ("content", str | None)):
            if field not in message:
                raise ValueError(f"message {number} has no {field}; give one beside {', '.join(message) or 'nothing'}")
            if not isinstance(message[field], allowed):
                raise ValueError(f"the {field} of message {number} is {_kind(message[field])}; give a text")


def _kind(value: Any) -> str:
    return "empty" if value in ([], ()) else f"a {type(value).__name__}"


def _tokenizer_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again") from error
    return config if isinstance(config, dict) else {}


def _default(templates: Any) -> Any:
    """Of several named templates, the default one."""
    if not isinstance(templates, list):
        return templates
    named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    return named.get("default")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like; each stands there as text, or as an object with its content."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _environment() -> "_Environment":
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    del environment.globals["lipsum"]
    # The type itself would give out `dict.update`, which changes a message and which the sandbox does not know.
    environment.globals |= {"namespace": _Namespace, "dict": lambda **items: items, "raise_exception": _refuse}
    environment.filters["tojson"] = _to_json
    return environment


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products of bounded size and without powers."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it raises to a power, which is not allowed")
        for value, times in ((left, right), (right, left)):
            size = len(value) if hasattr(value, "__len__") else 1
            if isinstance(times, int) and size * abs(times) > MAX_OUTPUT:
                raise SecurityError(f"it multiplies to a size of more than {MAX_OUTPUT:,}")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that Python gives a meaning to."""

    def __init__(self, /, **items: Any) -> None:
        super().__init__()
        for name, value in items.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no name with an underscore in front, such as {name}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` marks what the model is trained to say; the text is that of its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
