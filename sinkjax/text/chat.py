"""Chat templates: a conversation as the text that a model was trained to read.

Templates are Jinja programs that come with a model's weights, so they run in a sandbox. They see
what Hugging Face transformers shows them: the messages, the special tokens, `raise_exception`,
`strftime_now` and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Returns the conversation as the chat template writes it.

    Args:
        template: the template's Jinja source.
        messages: mappings with a "role" and mostly a "content".
        add_generation_prompt: end with what makes the assistant answer.
        **variables: what else the template may use, such as `bos_token`, `eos_token`, `tools`.

    Raises:
        ValueError: there is no template, it is not valid, or it refuses the messages.
    """
    if template is None:
        raise ValueError(
            "the model has no chat template, so it cannot take messages; give it plain text, or "
            "set a chat template of the kind that it was trained with"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"message {index} is {message!r}; expected a mapping such as "
                "{'role': 'user', 'content': 'Hello'}"
            )
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **{"tools": None, "documents": None, **variables},
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template, line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refused the messages: {error.message}") from error


def next_turn(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    seen: str,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Returns the text that is new since `seen`, for a model that remembers what it has seen.

    In ChatML, after a reply that ended with `<|im_end|>`, that is
    `"<|im_end|>\\n<|im_start|>user\\n…"`: the stop token was sampled but never fed. To have the
    tokens that the whole conversation has, use `Tokenizer.next_turn`.

    Args:
        template: the template's Jinja source.
        messages: the whole conversation, the new messages included.
        seen: the text that the model has read and written so far: the last rendering, then the
            reply as it was sampled, without a stop token that was not fed.
        add_generation_prompt: end with what makes the assistant answer.
        **variables: as for `render`, and the same as for the rendering in `seen`.

    Raises:
        ValueError: the whole conversation does not begin with `seen` (some templates trim replies,
            or drop the reasoning from earlier turns), so what the model remembers is not what it
            should have read. Start with an empty cache and feed all of `render(...)`.
    """
    whole = render(template, messages, add_generation_prompt=add_generation_prompt, **variables)
    if not whole.startswith(seen):
        pairs = enumerate(zip(whole, seen, strict=False))
        at = next((i for i, (now, then) in pairs if now != then), min(len(whole), len(seen)))
        raise ValueError(
            "the chat template writes the earlier turns otherwise than they were seen: at "
            f"character {at} it has {whole[at : at + 40]!r}, seen was {seen[at : at + 40]!r}. "
            "The cache cannot be kept: start with an empty one and feed the whole conversation"
        )
    return whole[len(seen) :]


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks replies for training: here it marks nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
