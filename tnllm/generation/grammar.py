"""Text that must fit a JSON schema, a regular expression or a grammar: which tokens may follow, from llguidance.

    grammars = Grammars(tokenizer, eos_ids=(2,))
    params = SamplingParams(grammar=grammars.json_schema({"type": "object"}))    # also regex(...), gbnf(...)
    matcher = params.grammar.matcher()          # one per sample
    matcher.excluded()                          # [V] bool, the tokens that may not follow
    matcher.push(token)                         # whether the text is complete

A grammar is compiled once, by the thread that reads the request, so that decoding never waits for it.
"""

import importlib.util
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnllm.errors import RunError, UserError, optional_import
from tnllm.tokenizer import Tokenizer

# At most one space between the parts of JSON: a small model may otherwise write spaces until its tokens end.
_JSON = {"whitespace_pattern": "[ ]?"}
# What needs more is refused. The library's own limits let a step take a second, in which all other texts wait.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 60_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
}
# Of a schema, an expression or a grammar.
MAX_CHARACTERS = 1 << 18


class GrammarError(RunError):
    """A grammar needs more work than is allowed, at this place in the text."""


class Matcher:
    """Where one sample stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def excluded(self) -> np.ndarray:
        """The tokens that may not follow, [V] bool; all may where the grammar has failed, which `error` then says."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=self._vocab_size)
        return np.zeros(self._vocab_size, bool) if self._matcher.is_error() else allowed == 0

    def push(self, token: int) -> bool:
        """Append a token; whether the text is complete and nothing may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> GrammarError | None:
        """Why nothing can be said of the text any more."""
        if not self._matcher.is_error():
            return None
        return GrammarError(f"the grammar cannot be followed any further ({_line(self._matcher.get_error())})")


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def matcher(self) -> Matcher:
        """One that stands at the start of a text."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles grammars for one tokenizer; any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        """The library is loaded when the first grammar is compiled. Its absence raises MissingExtra then."""
        self._tokenizer, self._eos_ids = tokenizer, list(eos_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    @property
    def available(self) -> bool:
        return importlib.util.find_spec("llguidance") is not None

    def json_schema(self, schema: Any) -> Grammar:
        """Of the JSON that fits a schema. Raises UserError."""
        text = json.dumps(schema)
        return self._compiled(text, lambda library: library.grammar_from_json_schema(text, overrides=_JSON))

    def regex(self, pattern: str) -> Grammar:
        """Of the complete text, in Rust's syntax: no look-around, no back-references. Raises UserError."""
        return self._compiled(pattern, lambda library: library.grammar_from_regex(pattern))

    def gbnf(self, text: str) -> Grammar:
        """Of llama.cpp's grammar format. Raises UserError."""

        def lark(library: Any) -> str:
            from llguidance.gbnf_to_lark import any_to_lark

            return str(library.grammar_from_lark(any_to_lark(text)))

        return self._compiled(text, lark)

    def _compiled(self, given: str, source: Callable[[Any], str]) -> Grammar:
        if len(given) > MAX_CHARACTERS:
            raise UserError(f"it has {len(given)} characters; at most {MAX_CHARACTERS}")
        with optional_import("schema", "llguidance"):
            from llguidance import LLMatcher, LLParserLimits
        try:
            text = source(LLMatcher)
        except Exception as error:
            # A translation raises whatever its parser does.
            raise UserError(_line(str(error))) from None
        matcher = LLMatcher(self._library_vocabulary(), text, log_level=0, limits=LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            # The first step finds what is too complex, and is part of every copy.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise UserError(_line(matcher.get_error()))
        return Grammar(matcher, self._tokenizer.vocab_size)

    def _library_vocabulary(self) -> Any:
        import llguidance

        with self._lock:
            if self._vocabulary is None:
                wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
                size = self._tokenizer.vocab_size
                self._vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=self._eos_ids)
            return self._vocabulary


class _Vocabulary:
    """What the library asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        # The mark is the library's for tokens without text.
        self.tokens = [data or b"\xff" + tokenizer.piece(id).encode() for id, data in enumerate(tokenizer.token_bytes)]
        self.special_token_ids = [id for id, data in enumerate(tokenizer.token_bytes) if not data]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _line(message: str) -> str:
    """The library's message in one line, without the state of its parser."""
    words = " ".join(message.partition("<state>")[0].split())
    return words if len(words) <= 200 else words[:197] + "..."
