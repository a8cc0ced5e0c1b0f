"""Chat templates: what transformers makes of the same ones, and what a hostile one cannot do."""

import copy
import datetime
import json

import pytest
from tokenizers import Tokenizer, models

from jgptq.chat import load_chat_template

CONVERSATION = [
    {"role": "system", "content": "  Be brief. <b> & 'é' "},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello,\nyou"},
    {"role": "user", "content": "Bye"},
]
# Written for these tests in the manners of published templates: block tags on lines of their own, namespaces, macros,
# loop controls, JSON, the date, tools that may be absent, and marks around what is to be learned.
TEMPLATES = {
    "lines": """
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- bos_token + '[S]' + message['content'] | trim + '[/S]' }}
    {% elif message.role == 'assistant' %}
        {% generation %}
        {{ ' ' ~ message.content ~ eos_token }}
        {% endgeneration %}
    {% else %}
        {{ '[I] ' + message['content'] + ' [/I]' }}
    {% endif %}
{% endfor %}
""",
    "namespace": """{% set ns = namespace(count=0, last=none) %}{% for m in messages %}{% if m.role == 'system' %}
{% continue %}{% endif %}{% set ns.count = ns.count + 1 %}{% set ns.last = m.content %}{% if ns.count > 2 %}{% break %}
{% endif %}<{{ ns.count }}>{{ m.content }}{% endfor %}{{ ns.last }}""",
    "macro": """{% macro turn(m) %}<|{{ m['role'] }}|>
{{ m.content }}<|end|>
{% endmacro %}{{ bos_token }}{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ dict(a=1, b='é') | tojson }}",
    "options": "{{ tools is none }}{{ documents is none }}{{ unk_token is defined }}{{ strftime_now('%Y')|length }}",
    "numbers": "{{ '-' * 3 }}{{ 2 * 3.5 }}{{ range(3)|list }}{{ messages[::-1]|map(attribute='role')|join(',') }}",
}
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "model_max_length": 5}


@pytest.fixture
def template(tmp_path):
    """Loads a template from a model directory that has it."""

    def load(source):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        return load_chat_template(tmp_path)

    return load


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_as_transformers_renders_it(template, name, add_generation_prompt):
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )
    options = {"add_generation_prompt": add_generation_prompt}
    expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, **options)
    assert template(TEMPLATES[name]).render(CONVERSATION, **options) == expected


def test_the_template_file_comes_before_the_tokenizers_configuration(tmp_path):
    def render():
        return load_chat_template(tmp_path).render(CONVERSATION)

    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one {{ messages|length }}"}))
    assert render() == "one 4"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert render() == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render() == "file"


def test_the_date_can_be_fixed(template):
    rendered = template("{{ strftime_now('%d %b %Y') }}").render(CONVERSATION, today=datetime.datetime(2020, 2, 29))
    assert rendered == "29 Feb 2020"


HOSTILE = {
    "Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__.items() }}",
    "globals of a class": "{{ namespace.__init__.__globals__.items() }}",
    "attributes by filter": "{{ (messages|attr('__class__')).__mro__ }}",
    "format strings": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "an appended message": "{{ messages.append(1) }}",
    "a changed message": "{{ messages[0].update({'role': 'x'}) }}",
    "a message changed through dict": "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "dunders of a namespace": "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "dunders given to a namespace": "{{ namespace(__html__=1) }}",
    "long products": "{{ 'a' * 100000000 }}",
    "long products, turned around": "{{ 100000000 * [1] }}",
    "powers": "{{ 9 ** 99 }}",
    "long ranges": "{{ range(100000000)|length }}",
    "long output": "{% for a in range(9999) %}{% for b in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "filler text": "{{ lipsum() }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_stopped_and_changes_nothing(template, source):
    messages = copy.deepcopy(CONVERSATION)
    with pytest.raises(ValueError, match=r"chat template .*chat_template\.jinja failed"):
        template(source).render(messages)
    assert messages == CONVERSATION


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages are empty; give a list"),
        ("Hi", "messages are a str; give a list"),
        (["Hi"], "message 1 is a str; give an object"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 has no role; give one beside content"),
        ([{"role": "user"}], "message 1 has no content; give one beside role"),
        ([{"role": "user", "content": ["a"]}], "the content of message 1 is a list; give a text"),
        ([{"role": None, "content": "a"}], "the role of message 1 is a NoneType"),
        ([{"role": "user", "content": "a", "extra": {1}}], "failed: Object of type set is not JSON"),
    ],
)
@pytest.mark.usefixtures("without_type_checker")
def test_what_is_no_conversation_is_named(template, messages, message):
    with pytest.raises(ValueError, match=message):
        template("{{ messages }}").render(messages)


def test_what_the_template_says_against_a_conversation_is_passed_on(template):
    refusing = template("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(ValueError, match=r"the chat template .*chat_template.jinja failed: Roles must alternate"):
        refusing.render(CONVERSATION)


def test_a_directory_without_a_readable_template_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template, neither chat_template.jinja nor"):
        load_chat_template(tmp_path)
    for config in ("{}", '{"chat_template": [{"name": "rag", "template": "x"}]}', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match="has no chat template"):
            load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not one that Jinja reads"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (1 << 20) + "y")
    with pytest.raises(ValueError, match=r"has more than 1,048,576 characters"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_chat_template(tmp_path)
