"""Prompt templates: the checkpoint's own jinja file, or the built-in one of its family.

A template sees `messages` (role, content), the tokenizer's special tokens and
`add_generation_prompt`, as transformers passes them. Built-in ones take content as one string.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..config import ModelConfig, read_json
from ..errors import ModelError, UsageError

POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions. "
)


def _vicuna(system: str) -> str:
    """A space ends a question, </s> an answer (LLaVA conversation.py, SeparatorStyle.TWO)."""
    return (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
        '{% else %}{{ "' + system + '" }}{% endif %}'
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def _chatml(system: str, after: str) -> str:
    """<|im_start|>role, the text, <|im_end|> and `after` (conversation.py, CHATML and MPT)."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n" + system + "<|im_end|>" + after + "' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>" + after + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


BUILT_IN = {
    "vicuna_v1": _vicuna(POLITE.format("user")),  # LLaVA-1.5, 1.6 and NeXT-Video as trained
    "llava_v1": _vicuna(POLITE.format("human")),  # what the original command line picks for "v1"
    "vicuna": _vicuna(""),  # LLaVA-1.5 in the HF layout: no system prompt
    "mistral_instruct": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        "{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
        "{% endif %}{% endfor %}"
    ),
    "qwen_1_5": _chatml("You are a helpful assistant.", "\\n"),  # OneVision, LongVA
    "qwen_2_5": _chatml(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "\\n"
    ),
    "chatml_direct": _chatml("Answer the questions.", ""),
}


def _default(config: ModelConfig) -> str:
    """The built-in template a family was trained with."""
    if config.text.kind != "llama":
        return {"mistral": "mistral_instruct", "qwen2": "qwen_1_5"}[config.text.kind]
    if config.layout == "original":
        return "vicuna_v1"
    return {"llava": "vicuna", "llava_next": "llava_v1"}.get(config.family, "vicuna_v1")


class _Generation(Extension):
    """{% generation %} marks answers for training; here its body is simply printed."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@dataclass(frozen=True)
class PromptTemplate:
    """A compiled template. `name` is a built-in's name or the file it comes from."""

    name: str
    source: Callable[..., str]
    tokens: dict[str, str]  # bos_token, eos_token, ... of the tokenizer

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt up to where the answer starts. Raises ModelError when the template fails."""
        try:
            return self.source(messages=messages, add_generation_prompt=True, **self.tokens)
        except Exception as e:  # a template is a foreign program: anything can come out of it
            raise ModelError(
                f"the chat template {self.name} fails on this conversation ({e}): "
                f"choose another template ({', '.join(BUILT_IN)})"
            ) from None

    def takes_parts(self) -> bool:
        """Whether content may be a list of parts; many templates insert it as a string."""
        part = {"type": "text", "text": "probe"}
        try:
            text = self.render([{"role": "user", "content": [part]}])
        except ModelError:
            return False
        return "probe" in text and "'text'" not in text


def load_template(
    folder: Path, config: ModelConfig, choice: str | None, tokens: dict[str, str]
) -> PromptTemplate:
    """The template `choice` names (built-in or .jinja file); None: the checkpoint's, else built-in.

    Raises UsageError for an unknown choice, ModelError for a template that does not compile.
    """
    name, source = _named(choice) if choice is not None else _shipped(folder, config)
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return PromptTemplate(name, env.from_string(source).render, tokens)
    except (jinja2.TemplateError, RecursionError) as e:
        raise ModelError(
            f"the chat template {name} is not valid jinja ({e}): choose another template "
            f"({', '.join(BUILT_IN)})"
        ) from None


def _named(choice: str) -> tuple[str, str]:
    if choice in BUILT_IN:
        return choice, BUILT_IN[choice]
    try:
        return choice, Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UsageError(
            f"template {choice!r} is neither built in ({', '.join(BUILT_IN)}) nor a readable file"
        ) from None


def _shipped(folder: Path, config: ModelConfig) -> tuple[str, str]:
    own = folder / "chat_template.jinja"
    if own.exists():
        try:
            return str(own), own.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise ModelError(f"{own} is not readable ({e}): download the file again") from None
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / file).get("chat_template") if (folder / file).exists() else None
        if isinstance(found, list):  # several named templates: "default" answers, others use tools
            found = {t["name"]: t["template"] for t in found}.get("default")
        if isinstance(found, str):
            return str(folder / file), found
    return _default(config), BUILT_IN[_default(config)]
