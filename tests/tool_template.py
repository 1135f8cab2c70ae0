"""A tiny model that knows tools and thinking, and its chat template in the layout of Gemma 4's published one.

The published template has three ages and two sizes. In the oldest, results of tools are only read where they are
attached to the message of their calls, and each message is a turn of its own, which is closed unless it ends in
results. In the second, messages of the model are one turn, but it is closed behind a text all the same. Larger models
get an empty thought when thinking is off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from siglance.engine import Engine
from siglance.export.exporter import export

from . import tiny
from .tiny_tokenizer import GEMMA4_TOKENS

__all__ = ["speller", "thinking_bundle", "tool_template"]

_MACROS = r"""
{%- macro quoted(text) -%}{{ '<|"|>' + text + '<|"|>' }}{%- endmacro -%}
{%- macro value(it, quote_keys=false) -%}
  {%- if it is string -%}{{ quoted(it) }}
  {%- elif it is boolean -%}{{ 'true' if it else 'false' }}
  {%- elif it is mapping -%}
    {{ '{' }}
    {%- for key, inner in it | dictsort -%}
      {{ quoted(key) if quote_keys else key }}:{{ value(inner, quote_keys) }}{{ '' if loop.last else ',' }}
    {%- endfor -%}
    {{ '}' }}
  {%- elif it is sequence -%}
    {{ '[' }}
    {%- for inner in it -%}{{ value(inner, quote_keys) }}{{ '' if loop.last else ',' }}{%- endfor -%}
    {{ ']' }}
  {%- elif it is none -%}{{ NULL }}
  {%- else -%}{{ it }}
  {%- endif -%}
{%- endmacro -%}
{%- macro schema(it) -%}
  {{ '{' }}
  {%- if it.description -%}description:{{ quoted(it.description) }},{%- endif -%}
  {%- if it.enum -%}enum:{{ value(it.enum, true) }},{%- endif -%}
  {%- if it['items'] is mapping -%}items:{{ schema(it['items']) }},{%- endif -%}
  {%- if it.properties is mapping -%}properties:{{ fields(it.properties) }},{%- endif -%}
  {%- if it.required -%}required:{{ value(it.required) }},{%- endif -%}
  type:{{ quoted(it.type | upper) }}
  {{- '}' }}
{%- endmacro -%}
{%- macro fields(properties) -%}
  {{ '{' }}
  {%- for key, inner in properties | dictsort -%}
    {{ key }}:{{ schema(inner) }}{{ '' if loop.last else ',' }}
  {%- endfor -%}
  {{ '}' }}
{%- endmacro -%}
{%- macro declaration(it) -%}
  {{ '<|tool>declaration:' + it.name + '{description:' }}{{ quoted(it.description) }}
  {%- if it.parameters -%},parameters:{{ schema(it.parameters) }}{%- endif -%}
  {{ '}<tool|>' }}
{%- endmacro -%}
{%- macro response(name, it) -%}
  {{ '<|tool_response>response:' + name }}
  {{- value(it) if it is mapping else '{value:' + value(it) + '}' }}
  {{- '<tool_response|>' }}
{%- endmacro -%}
{%- macro said(content, role) -%}
  {%- if content is string -%}
    {%- if role == 'model' -%}
      {%- set ns = namespace(kept='') -%}
      {%- for part in content.split('<channel|>') -%}
        {%- set ns.kept = ns.kept + part.split('<|channel>')[0] -%}
      {%- endfor -%}
      {{ ns.kept | trim }}
    {%- else -%}{{ content | trim }}
    {%- endif -%}
  {%- else -%}
    {%- for item in content -%}
      {%- if item.type == 'text' -%}{{ said(item.text, role) }}{%- else -%}{{ '<|' + item.type + '|>' }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_SYSTEM = r"""
{%- set has_system = messages[0].role in ('system', 'developer') -%}
{%- if enable_thinking or tools or has_system -%}
  {{ '<|turn>system\n' }}
  {%- if enable_thinking -%}{{ '<|think|>\n' }}{%- endif -%}
  {%- if has_system -%}{{ said(messages[0].content, 'system') }}{%- set messages = messages[1:] -%}{%- endif -%}
  {%- for tool in tools or [] -%}{{ declaration(tool.function) }}{%- endfor -%}
  {{ '<turn|>\n' }}
{%- endif -%}
"""

_TURNS = r"""
{%- set state = namespace(role='', answered=false, last_user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set state.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages if message.role != 'tool' or not ATTACHED -%}
  {%- set role = 'model' if message.role == 'assistant' else message.role -%}
  {%- if role == 'tool' -%}
    {{ response(message.name, message.content) }}
    {%- set state.answered = true -%}
    {%- continue -%}
  {%- endif -%}
  {%- if CLOSES and state.role and not state.answered -%}{{ '<turn|>\n' }}{%- endif -%}
  {%- if CLOSES == 'turn' or role != state.role or role != 'model' -%}
    {{ '<turn|>\n' if state.role and not CLOSES }}{{ '<|turn>' + role + '\n' }}
  {%- endif -%}
  {%- set state.role = role -%}
  {%- set state.answered = false -%}
  {%- if message.reasoning_content and message.tool_calls and messages.index(message) > state.last_user -%}
    {{ '<|channel>thought\n' + message.reasoning_content + '\n<channel|>' }}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {{ '<|tool_call>call:' + call.function.name }}{{ value(call.function.arguments) }}{{ '<tool_call|>' }}
  {%- endfor -%}
  {%- for one in message.tool_responses or [] if ATTACHED -%}
    {{ response(one.name, one.response) }}
    {%- set state.answered = not message.content -%}
  {%- endfor -%}
  {{ said(message.content, role) }}
{%- endfor -%}
{%- if state.role == 'model' and state.answered -%}
  {%- if enable_thinking -%}{{ '<|channel>thought\n' }}{%- endif -%}
{%- else -%}
  {{ '<turn|>\n' }}
  {%- if add_generation_prompt -%}
    {{ '<|turn>model\n' }}
    {%- if LARGE and not enable_thinking -%}{{ '<|channel>thought\n<channel|>' }}{%- endif -%}
  {%- endif -%}
{%- endif -%}
"""


def tool_template(*, large: bool = False, attached: bool = True, closes: str = "", null: str = "null") -> str:
    """The template: of a `large` model, reading results where they are `attached` or in messages, writing `null` so.

    It `closes` each message as a "turn", or the one turn of several messages behind their "text".
    """
    flags = {"LARGE": str(large).lower(), "ATTACHED": str(attached).lower(), "CLOSES": f"'{closes}'"}
    flags["NULL"] = f"'{null}'"
    text = "{{ bos_token }}" + _MACROS + _SYSTEM + _TURNS
    for name, value in flags.items():
        text = text.replace(name, value)
    return text


def thinking_bundle(folder: Path, template: str | None = None) -> Path:
    """The folder of a tiny bundle with this template."""
    tiny.write_gemma4(folder / "checkpoint", max_position_embeddings=16384)
    (folder / "checkpoint" / "chat_template.jinja").write_text(template or tool_template(), encoding="utf-8")
    export(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


def speller(engine: Engine) -> Callable[[str], list[int]]:
    """A function that gives the ids of a text in which markers are spelled."""
    tokenizer = engine._tokenizer  # spells everything out
    known = {token: tokenizer.token_to_id(token) for token in (*GEMMA4_TOKENS, "<bos>", "<eos>")}

    def spell(text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, known)) + ")", text):
            ids += [known[piece]] if piece in known else tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    return spell
