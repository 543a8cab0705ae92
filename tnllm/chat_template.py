"""The one form of a conversation, token for token: in training, `generate`, `serve`, `eval` and the exported tokenizer.

    segments = render(DEFAULT, [("system", "Be brief."), ("user", "Who came?")])
    ids = encode(segments, tokenizer.encode, tokenizer.eos_id)       # the answer follows
    stop = stop_strings(DEFAULT)                                     # what ends an answer, besides the end token
    jinja = to_jinja(DEFAULT, control_tokens=("<unk>", "<s>", "</s>"))

A template is the text around a user's prompt. A system text precedes it, on lines of its own; prompt and answer are
encoded separately, as they are when the model is asked; every answer ends with the end token. Control tokens are never
part of a segment's text, so the text `</s>` in a message stays text.

Two callers hand a conversation on as one string, in which Unicode noncharacters mark what text must not be mistaken for:
lm-evaluation-harness (`to_marked`, `from_marked`) and the exported tokenizer (`to_jinja`).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tnllm.errors import UserError

# The template of the released models' fine-tuning.
DEFAULT = "Human:\n{prompt}\nAssistant:\n"
ROLES = ("system", "developer", "user", "assistant")

# Marks of `to_marked`: the end token; the end of a prompt; and what escapes these three in a text.
_EOS, _END_OF_PROMPT, _ESCAPE = _MARKS = "\ufdd0", "\ufdd1", "\ufdd2"
_ANY_MARK = f"[{''.join(_MARKS)}]"
# Marks of `to_jinja`: inside the name of a control token that is text; between a prompt and its answer.
BREAK, BOUNDARY = "\ufdd0", "\ufdd1"


class Segment(NamedTuple):
    """A text that is encoded separately from its neighbours; the end token follows it if `eos`."""

    text: str
    is_answer: bool
    eos: bool


def split_template(template: str) -> tuple[str, str]:
    """What comes before and after the prompt. Raises UserError unless {prompt} is there once."""
    opening, placeholder, closing = template.partition("{prompt}")
    if not placeholder or "{prompt}" in closing:
        raise UserError(f"the chat template is {template!r}; it must hold {{prompt}} once")
    return opening, closing


def stop_strings(template: str) -> tuple[str, ...]:
    """The stop string that ends an answer in which the model starts to speak for the user, if there is one."""
    opening = split_template(template)[0].strip()
    return ("\n" + opening,) if opening else ()


def render(template: str, messages: Sequence[tuple[str, str]], open_answer: bool = False) -> list[Segment]:
    """Segments of a conversation of (role, text) messages; with `open_answer` the last answer does not end yet.

    Roles are "system" (or "developer"), "user" and "assistant", in any order: what stands between two answers is one
    prompt, so that the model sees the form that it was trained on. The system texts come first, then the users'
    texts, each on lines of its own. An answer without a prompt has an empty one. Raises UserError for any other role,
    and for a template without {prompt}.
    """
    opening, closing = split_template(template)
    segments: list[Segment] = []
    system, user = "", list[str]()
    # Whether a prompt has begun that no answer follows yet.
    is_open = False
    for index, (role, text) in enumerate(messages):
        if role not in ROLES:
            raise UserError(f"message {index} is of role {role!r}; allowed: {', '.join(ROLES)}")
        if role == "assistant":
            segments.append(Segment(system + opening + "\n".join(user) + closing, is_answer=False, eos=False))
            ends = not (open_answer and index == len(messages) - 1)
            segments.append(Segment(text, is_answer=True, eos=ends))
            system, user, is_open = "", [], False
        else:
            is_open = True
            if role == "user":
                user.append(text)
            elif text:
                system += text + "\n"
    if is_open:
        segments.append(Segment(system + opening + "\n".join(user) + closing, is_answer=False, eos=False))
    return segments


def render_part(
    template: str, messages: Sequence[tuple[str, str]], awaits_answer: bool = False, is_last: bool = True
) -> tuple[list[Segment], bool]:
    """Segments of a part of a conversation, which follow those of the parts before it; whether an answer follows them.

    awaits_answer: what this function said of the part before. is_last: the answer follows, so that a last message of
    the assistant is its beginning; otherwise other parts do, and system texts at the end wait for a user's. Raises
    UserError for a question where an answer is due.
    """
    segments = render(template, messages, open_answer=is_last)
    if awaits_answer and messages:
        if messages[0][0] != "assistant":
            raise UserError(
                "the conversation waits for an answer; messages must be empty, or begin with the assistant's"
            )
        # The prompt of this answer was read with the part before.
        del segments[0]
    roles = [role for role, _ in messages]
    ended = "assistant" not in roles[-1:]
    if is_last or not messages:
        return segments, awaits_answer or bool(messages)
    last = roles[len(roles) - roles[::-1].index("assistant") :] if "assistant" in roles else roles
    if ended and "user" not in last:
        texts = [text + "\n" for _, text in messages[len(messages) - len(last) :] if text]
        segments[-1:] = [Segment("".join(texts), is_answer=False, eos=False)]
    return segments, "user" in last


def encode(segments: Iterable[Segment], encode_text: Callable[[str], list[int]], eos_id: int) -> list[int]:
    """Token ids of `segments`."""
    ids: list[int] = []
    for segment in segments:
        ids += encode_text(segment.text)
        if segment.eos:
            ids.append(eos_id)
    return ids


def to_marked(segments: Iterable[Segment]) -> str:
    """`segments` as one string, to which text may be appended; `from_marked` reads it."""
    parts = []
    for segment in segments:
        end = _EOS if segment.eos else "" if segment.is_answer else _END_OF_PROMPT
        parts.append(re.sub(_ANY_MARK, rf"{_ESCAPE}\g<0>", segment.text) + end)
    return "".join(parts)


def from_marked(marked: str) -> list[Segment]:
    """The segments of a string made by `to_marked`. A text without marks is one open segment."""
    segments, text = [], ""
    for part in re.split(f"({_ESCAPE}{_ANY_MARK}|{_ANY_MARK})", marked):
        if part in (_EOS, _END_OF_PROMPT):
            segments.append(Segment(text, is_answer=part == _EOS, eos=part == _EOS))
            text = ""
        else:
            text += part.removeprefix(_ESCAPE) if len(part) == 2 else part
    return [*segments, Segment(text, is_answer=True, eos=False)] if text or not segments else segments


def ends_of_segments(marked: str) -> list[int]:
    """Where the segments of a string made by `to_marked` end, after their marks; an open last one is not among them."""
    parts = re.finditer(f"{_ESCAPE}{_ANY_MARK}|{_ANY_MARK}", marked)
    return [part.end() for part in parts if part[0] in (_EOS, _END_OF_PROMPT)]


def to_jinja(
    template: str, control_tokens: Sequence[str], bos: str = "", boundary: bool = False, answer_prefix: str = ""
) -> str:
    """The template in the language of transformers' `apply_chat_template`, where an answer ends with `eos_token`.

    That tokenizer reads the names of control tokens in any text as the tokens. BREAK after the first character of a
    name prevents this; the tokenizer's normalizer removes it. `bos` comes first. With `boundary`, BOUNDARY separates
    an answer from its prompt, for tokenizers that would merge the two. `answer_prefix` precedes an answer
    that is not empty.
    """
    opening, closing = map(_literal, split_template(template))
    safe = "".join(f" | replace({_literal(name)}, {_literal(name[0] + BREAK + name[1:])})" for name in control_tokens)
    before = f"{_literal(BOUNDARY)} ~ " if boundary else ""
    before += f"({_literal(answer_prefix)} if text else '') ~ " if answer_prefix else ""
    reserved = (
        f"{{% if {_literal(BOUNDARY)} in text %}}{{{{ raise_exception('a message holds the noncharacter U+FDD1') }}}}"
        "{% endif %}"
    )
    prompt = f"{{{{ (state.system ~ {opening} ~ (state.user | join('\\n')) ~ {closing}){safe} }}}}"
    return (
        (f"{{{{ {_literal(bos)} }}}}" if bos else "")
        + "{% set state = namespace(system='', user=[], is_open=false) %}{% for message in messages %}"
        "{% set text = message['content'] if message['content'] is string"
        " else message['content'] | map(attribute='text') | join %}"
        + (reserved if boundary else "")
        + f"{{% if message['role'] not in {ROLES} %}}"
        f"{{{{ raise_exception('a message is of role ' ~ message['role'] ~ '; allowed: {', '.join(ROLES)}') }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{prompt}{{{{ {before}(text{safe}) ~ eos_token }}}}"
        "{% set state.system = '' %}{% set state.user = [] %}{% set state.is_open = false %}"
        "{% else %}{% set state.is_open = true %}"
        "{% if message['role'] == 'user' %}{% set state.user = state.user + [text] %}"
        "{% elif text %}{% set state.system = state.system ~ text ~ '\\n' %}{% endif %}"
        "{% endif %}{% endfor %}"
        f"{{% if state.is_open %}}{prompt}{{% endif %}}"
    )


def _literal(text: str) -> str:
    """A string literal of jinja."""
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return f"'{text}'"
