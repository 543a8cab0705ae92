"""Prompts in, text out: prefill the prompts, then decode one token per step from a recurrent state of constant size.

    text = generate_text(model, tokenizer, "Once upon a time", max_tokens=50, temperature=0.8, seed=1)

    for event in generate(model, tokenizer, ["One", "Two"], SamplingParams(seed=1)):
        if isinstance(event, Piece):
            print(event.index, event.text)          # as it is generated
        else:
            print(event.index, event.finish_reason) # a Result: one per sample, with the complete text

A sample depends only on its prompt, options and seed: not on the rest of the batch, the chunks of the prefill, or whether
it started from a saved context.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tnllm.errors import RunError, UserError
from tnllm.generation.context import CHUNK_TOKENS, Context, read
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Piece, Result, Row, start_rows
from tnllm.generation.slots import Parked, Slots, check_lookup
from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer

# Rows decoded together. A step reads every weight once whatever the batch, so rows are nearly free until the
# states (13 MB a row at 385M) or the arithmetic count.
BATCH_SIZE = 16


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> str:
    """The continuation of `prompt`, without the prompt; keywords are the fields of SamplingParams.

    An empty prompt starts from the begin token. Raises UserError for a bad option.
    """
    params = SamplingParams.of(sampling)
    if params.n != 1:
        raise UserError(f"n is {params.n}; generate_text gives one text: use generate for several")
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
    events = generate(model, tokenizer, [ids], params)
    return next(event.text for event in events if isinstance(event, Result))


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    contexts: Sequence[Context | None] | None = None,
    histories: Sequence[Sequence[int]] | None = None,
    keep_contexts: bool = False,
    eos_ids: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    chunk_tokens: int = CHUNK_TOKENS,
    sync_every: int | None = None,
) -> Iterator[Piece | Result]:
    """Generate `params.n` samples for each prompt: a Piece per token as it is generated, a Result per finished sample.

    prompts: texts or token ids; an empty one needs a context to continue. params: one for all, or one each.
    contexts: what precedes each prompt; histories: its tokens, for prompt lookup alone. keep_contexts: give each Result the
    context after its last token.
    eos_ids: tokens that end a text (default: the tokenizer's). batch_size: rows decoded together; samples of one prompt
    always are. Results of a batch come in the order they finish, batches in the order of the prompts.
    sync_every: tokens between two synchronisations with the device (default: see Slots).
    Raises UserError for a bad prompt, before anything is generated, RunError if the model gives non-finite logits.
    """
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(ids)
    befores: list[Context | None] = [None] * len(ids) if contexts is None else list(contexts)
    assert len(params) == len(befores) == len(ids), "one of params and contexts for each prompt"
    _check(model, tokenizer, ids, params, befores)
    stop_ids = frozenset([tokenizer.eos_id] if eos_ids is None else eos_ids)

    def batches() -> Iterator[Piece | Result]:
        start = 0
        while start < len(ids):
            end, num_rows = start, 0
            while end < len(ids) and (num_rows == 0 or num_rows + params[end].n <= batch_size):
                num_rows += params[end].n
                end += 1
            rows: list[tuple[Row, Context]] = []
            contexts = read(model, ids[start:end], befores[start:end], chunk_tokens)
            for index, context in zip(range(start, end), contexts, strict=True):
                searched = [*(histories[index] if histories else ()), *ids[index]]
                for row in start_rows(tokenizer, index, params[index], len(ids[index]), context.tail, searched):
                    rows.append((row, context))
            slots = Slots(model, tokenizer, num_rows, keep_contexts=keep_contexts, sync_every=sync_every)
            for row, context in rows:
                if row.params.max_tokens == 0:
                    row.reason, row.context = "length", context if keep_contexts else None
                    yield row.result()
                else:
                    slots.join(row, Parked(context))
            while slots.rows:
                decoded = slots.decode(stop_ids)
                for _, pieces in decoded:
                    if isinstance(pieces, RunError):
                        raise pieces
                    yield from pieces
                yield from (row.result() for row, _ in decoded if row.reason)
            start = end

    return batches()


def _check(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    befores: Sequence[Context | None],
) -> None:
    """Raise UserError for what cannot be generated."""
    for index, (prompt, before) in enumerate(zip(ids, befores, strict=True)):
        if not prompt and before is None:
            raise UserError(f"prompt {index} is empty; give text, or the begin token to start from nothing")
    if any(one.prompt_lookup for one in params):
        check_lookup(model)
    for bad in {id for one in params for id, _ in one.logit_bias if id >= tokenizer.vocab_size}:
        raise UserError(f"logit_bias has token {bad}; the vocabulary has {tokenizer.vocab_size}")
    tokenizer.check_vocabulary(model.config.vocab_size)
