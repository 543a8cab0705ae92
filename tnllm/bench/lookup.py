"""Prompt lookup beside plain decoding, one text at a time, in turns.

    rows = bench_lookup(model, tokenizer, 16, num_tokens=256, rounds=5)

Two texts: one token over and over (a bias of 100 on its logit), where every proposal is right, the most that a lookup can
give; and ordinary text, drawn with a new seed in each round, where there is nothing to gain.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from tnllm.generation.context import read
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Row, start_rows
from tnllm.generation.slots import Parked, Slots
from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer

_TEXTS: dict[str, dict[str, Any]] = {
    "repetitive": {"temperature": 0.0, "logit_bias": ((500, 100.0),)},
    "ordinary": {"temperature": 0.8, "top_p": 0.95},
}


def bench_lookup(
    model: LanguageModel,
    tokenizer: Tokenizer,
    count: int,
    num_tokens: int,
    rounds: int,
    log: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for each text: tokens per second of both ways, their ratio by rounds, proposals, and texts that are equal."""
    ids, rows = tokenizer.encode("Once upon a time there was"), []
    for text, options in _TEXTS.items():
        speeds: dict[int, list[float]] = {0: [], count: []}
        proposed = right = equal = 0
        for seed in range(rounds + 1):
            params = {"max_tokens": num_tokens, "seed": seed, "ignore_eos": True, **options}
            texts = []
            # Who begins alternates; the first round, in which buffers are made, is not counted.
            for way in (0, count) if seed % 2 else (count, 0):
                row, speed = _decode(model, tokenizer, ids, SamplingParams(**params, prompt_lookup=way))
                texts.append(row.tokens)
                if seed:
                    speeds[way].append(speed)
                if seed and row.lookup is not None:
                    proposed, right = proposed + row.lookup.num_proposed, right + row.lookup.num_right
            equal += seed > 0 and texts[0] == texts[1]
        ratios = [ours / plain for plain, ours in zip(*speeds.values(), strict=True)]
        rows.append({
            "text": text, "proposal": count, "tokens": num_tokens, "rounds": rounds,
            "plain_tokens_per_s": statistics.median(speeds[0]), "lookup_tokens_per_s": statistics.median(speeds[count]),
            "ratio": statistics.median(ratios), "low_ratio": min(ratios), "high_ratio": max(ratios),
            "proposed": proposed, "accepted_share": right / proposed if proposed else None, "equal_share": equal / rounds,
        })  # fmt: skip
        log(f"prompt lookup, {text} text: {rows[-1]['ratio']:.2f} x plain")
    return rows


def _decode(model: LanguageModel, tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[Row, float]:
    """A text, and its tokens per second."""
    [context] = read(model, [ids])
    [row] = start_rows(tokenizer, 0, params, len(ids), context.tail, ids)
    slots = Slots(model, tokenizer, 1)
    slots.join(row, Parked(context))
    start = time.perf_counter()
    while slots.rows:
        for _, error in slots.decode(frozenset()):
            if isinstance(error, Exception):
                raise error
    return row, len(row.tokens) / (time.perf_counter() - start)
