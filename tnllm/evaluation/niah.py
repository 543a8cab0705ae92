"""A needle in a haystack: is a fact found again that was read long before, by how long the text is and where it stood?

    rows = niah(loaded, lengths=[1024, 4096], depths=[0, 50, 100], samples=8)
    rows[0]["exact"], rows[0]["chosen"]

The needle says a secret number of a city, the haystack is text that has nothing to do with it, and the prompt ends where
the number follows (after RULER, arXiv 2404.06654, single needle). Two scores, so that small models show a difference too:
*exact*, every token of the number is the model's first choice; *chosen*, the number is likelier than nine others of its
kind (chance is a tenth).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tnllm.errors import UserError
from tnllm.generation.loading import LoadedModel
from tnllm.generation.prefix_tree import Request
from tnllm.generation.scoring import Report, Scorer
from tnllm.tokenizer import Tokenizer

OTHERS = 9
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito", "Perth", "Turin", "Sofia", "Minsk", "Dakar")
_NEEDLE = "The secret number of {city} is {number}."
_QUESTION = "\nWhat is the secret number of {city}? The secret number of {city} is"
FILLER = (
    "The road runs along the river for a while.",
    "Most of the houses here have small gardens.",
    "In the afternoon the market is almost empty.",
    "A boat comes by twice a day and brings the mail.",
    "The hills are green until the end of summer.",
    "Children walk to school over the old bridge.",
    "It rains more often in the north of the valley.",
    "There is a bakery at the corner of the square.",
    "In winter the lake is covered with thin ice.",
    "The library opens at nine and closes at six.",
)


@dataclass(frozen=True)
class Prompt:
    """One haystack with its needle, and the numbers to choose from: the right one first."""

    length: int
    depth: int  # where the needle stands, in per cent of the haystack
    context: list[int]  # at most `length` tokens
    answers: list[list[int]]


def prompts(
    tokenizer: Tokenizer,
    bos_id: int,
    lengths: Sequence[int],
    depths: Sequence[int],
    samples: int,
    seed: int,
    sentences: Sequence[str] = FILLER,
) -> Iterator[Prompt]:
    """`samples` prompts for each length and depth, of sentences drawn at random. Raises UserError if a length is short."""
    pieces = [tokenizer.encode(sentence.strip() + " ") for sentence in sentences]
    for length in lengths:
        for depth in depths:
            for sample in range(samples):
                # The same needles and sentences at every depth, so that depths differ in nothing else.
                rng = random.Random(f"{seed} {length} {sample}")
                city, *numbers = rng.choice(_CITIES), *rng.sample(range(1_000_000, 10_000_000), 1 + OTHERS)
                needle = tokenizer.encode(_NEEDLE.format(city=city, number=numbers[0]) + " ")
                question = tokenizer.encode(_QUESTION.format(city=city))
                room = length - 1 - len(needle) - len(question)
                if room < 0:
                    raise UserError(
                        f"a length of {length} tokens has no room for needle and question; give 128 or more"
                    )
                hay: list[list[int]] = []
                while (piece := rng.choice(pieces)) and len(piece) <= room:
                    hay.append(piece)
                    room -= len(piece)
                hay.insert(round(depth / 100 * len(hay)), needle)
                answers = [tokenizer.encode(f" {number}") for number in numbers]
                yield Prompt(length, depth, [bos_id, *(token for piece in hay for token in piece), *question], answers)


def niah(
    loaded: LoadedModel,
    lengths: Sequence[int],
    depths: Sequence[int],
    samples: int,
    seed: int = 0,
    sentences: Sequence[str] = FILLER,
    batch_tokens: int | None = None,
    report: Report = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row for each length and depth: `exact` and `chosen` as shares of `samples`, `nats` a token of the right number."""
    asked = list(prompts(loaded.tokenizer, loaded.bos_id, lengths, depths, samples, seed, sentences))
    requests = [Request(prompt.context, answer) for prompt in asked for answer in prompt.answers]
    scores = {score.index: score for score in Scorer(loaded.model, batch_tokens=batch_tokens).score(requests, report)}
    choice = 1 + OTHERS
    rows = []
    for first in range(0, len(asked), samples):
        exact = chosen = 0
        nats: list[float] = []
        for number in range(first, first + samples):
            right, *others = (scores[number * choice + index] for index in range(choice))
            exact += right.greedy
            chosen += all(right.logprobs.sum() > other.logprobs.sum() for other in others)
            nats.append(-float(right.logprobs.mean()))
        rows.append(
            {
                "length": asked[first].length, "depth": asked[first].depth, "samples": samples,
                "exact": exact / samples, "chosen": chosen / samples, "nats": sum(nats) / samples,
            }
        )  # fmt: skip
    return rows


def split_sentences(text: str) -> list[str]:
    """The sentences of a haystack of one's own: of 20 to 400 characters. Raises UserError if there are none."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?。！？])\s*|\n{2,}", text))
    found = [part for part in parts if 20 <= len(part) <= 400]
    if not found:
        raise UserError("the haystack has no sentence of 20 to 400 characters")
    return found
