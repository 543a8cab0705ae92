"""From logits to the next token: every sampling option, as pure functions on logits [B, V] fp32.

    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)      # validated; one per request
    options = Options.of([params, other], seeds=[1, 2], device=device)  # tensors, one element per row
    tokens = sample_ids(logits, options, positions, seen, counts)         # [B] int64

A sampled token depends only on the row's own logits, its seed and the token's position in the text: the same seed gives
the same text alone, in any batch, and after a state was saved and loaded. The noise comes from a counter-based generator
on the logits' device, so sampling never waits for the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tnllm.errors import UserError, did_you_mean
from tnllm.generation.grammar import Grammar

MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_LOOKUP = 64
# Tokens of one logit_bias.
MAX_BIASES = 1024
# Tokens that are ranked at first, on a CPU: a trained model's nucleus mostly has fewer.
_FEW = 256
MAX_SEED = _MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """A request's options for sampler and decoder. Raises UserError for a value out of range.

    Options apply in this order: grammar, logit_bias, penalties, temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 256  # most tokens to generate; 0 only prefills the prompt
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # drop tokens below this share of the top token's probability
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and the text become less likely (CTRL, 1909.05858)
    presence_penalty: float = 0.0  # subtracted from the logit of a token generated before
    frequency_penalty: float = 0.0  # subtracted once for each occurrence
    seed: int | None = None  # None: a new one each time
    stop: tuple[str, ...] = ()  # the text ends before any of these
    logprobs: int | None = None  # log-probabilities of the sampled token and of this many most likely ones
    n: int = 1  # samples; sample i has seed + i
    ignore_eos: bool = False  # continue after the end token, for measurements
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit); from a dict, too
    grammar: Grammar | None = None  # what the text must fit; it ends where that is complete
    prompt_lookup: int = 0  # tokens proposed at once from an earlier passage, while a text is decoded alone; 0: none

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {self.stop!r}; allowed: strings that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        _check_int("max_tokens", self.max_tokens, 0, None)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_int("prompt_lookup", self.prompt_lookup, 0, MAX_LOOKUP)
        _check_float("temperature", self.temperature, 0, 100)
        _check_float("top_p", self.top_p, 0, 1, open_low=True)
        _check_float("min_p", self.min_p, 0, 1)
        _check_float("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos is {self.ignore_eos!r}; allowed: true, false")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if not isinstance(self.grammar, Grammar | None):
            raise UserError(f"grammar is {self.grammar!r}; allowed: a compiled Grammar, from Python")

    @staticmethod
    def of(values: dict[str, Any]) -> "SamplingParams":
        """Build from plain values, such as a JSON object's; an unknown key names its nearest neighbour."""
        names = [field.name for field in fields(SamplingParams)]
        for key in values:
            if key not in names:
                raise UserError(
                    f"{key!r} is not a sampling option; allowed: {', '.join(names)}{did_you_mean(key, names)}"
                )
        return SamplingParams(**values)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(given.items()) if isinstance(given, dict) else given
    try:
        biases = tuple((int(id), bias) for id, bias in pairs)
    except (TypeError, ValueError):
        raise UserError('logit_bias must be an object of token ids and numbers, such as {"42": -100}') from None
    if len(biases) > MAX_BIASES:
        raise UserError(f"logit_bias has {len(biases)} tokens; at most {MAX_BIASES}")
    for id, bias in biases:
        _check_int("a token of logit_bias", id, 0, None)
        _check_float(f"logit_bias of token {id}", bias, -100, 100)
    return biases


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"{name} is {value!r}; allowed: a whole number, {allowed}")


def _check_float(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        allowed = f"above {low}, up to {high}" if open_low else f"{low} to {high}"
        raise UserError(f"{name} is {value!r}; allowed: a number, {allowed}")


@dataclass(frozen=True)
class Options:
    """The sampling options of B rows: tensors [B] on the logits' device."""

    temperature: Tensor  # fp32, as all but top_k and seed
    top_k: Tensor  # int64; V where off
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    seed: Tensor  # int64
    # Known on the host, to skip work that no row needs. They never change a row's result.
    draws: bool
    filters: bool
    repetition: bool
    counts: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str) -> "Options":
        """One row for each of `params`, with the seed of its random stream."""

        def column(name: str) -> Tensor:
            return torch.tensor([float(getattr(row, name)) for row in params], device=device)

        return Options(
            **{
                name: column(name)
                for name in (
                    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                )
            },
            top_k=torch.tensor([min(row.top_k or _MAX_INT, _MAX_INT) for row in params], device=device),
            seed=torch.tensor(list(seeds), dtype=torch.int64, device=device),
            draws=any(row.temperature > 0 for row in params),
            filters=any(
                row.temperature > 0 and (row.top_k > 0 or row.top_p < 1 or row.min_p > 0) for row in params
            ),
            repetition=any(row.repetition_penalty != 1 for row in params),
            counts=any(row.presence_penalty != 0 or row.frequency_penalty != 0 for row in params),
        )  # fmt: skip


def sample_ids(
    logits: Tensor, options: Options, positions: Tensor, seen: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """The next token of each row: logits [B, V] fp32 → [B] int64. Changes nothing and copies nothing to the host.

    positions [B] int64: number of tokens before the sampled one. seen [B, V] bool: tokens of the prompt and the text,
    needed with a repetition penalty. counts [B, V]: how often each token was generated, needed with the other two.
    """
    return sample_surely(logits, options, positions, seen, counts, 0.0)[0]


def sample_surely(
    logits: Tensor, options: Options, positions: Tensor, seen: Tensor | None, counts: Tensor | None, rounding: float
) -> tuple[Tensor, Tensor | None]:
    """As `sample_ids`, and [B] bool: whether logits that differ by `rounding` times the largest give the same token.

    With rounding 0 that is not computed.
    """
    logits = penalize(logits, options, seen, counts)
    near = None
    if rounding:
        # Twice, since two logits may move against each other.
        near = 2 * rounding * logits.masked_fill(logits.isinf(), 0.0).abs().amax(dim=-1, keepdim=True)
    if not options.draws:
        return logits.argmax(dim=-1), None if near is None else _leads(logits, near)
    temperature = options.temperature.clamp(min=1e-6)[:, None]
    near = None if near is None else near / temperature
    # Relative to the maximum, so that a tiny temperature gives zeros and large negatives, never inf - inf.
    scores = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
    ids = unsure = None
    if options.filters:
        ids, scores, dropped, unsure = keep_most_likely(scores, options.top_k, options.top_p, options.min_p, near)
        scores.masked_fill_(dropped if unsure is None else dropped & ~unsure, -math.inf)
    # The argmax of log p + Gumbel noise is a sample from p.
    among = torch.arange(logits.shape[-1], device=logits.device) if ids is None else ids
    noise = gumbel(options.seed, positions, among).masked_fill_(options.temperature[:, None] == 0, 0.0)
    scores = noise.add_(scores)
    column = (scores if unsure is None else scores.masked_fill(dropped, -math.inf)).argmax(dim=-1, keepdim=True)
    sure = None if near is None else _leads(scores, near)
    if sure is not None and unsure is not None:
        sure &= (scores.argmax(dim=-1) == column[:, 0]) & ~unsure.gather(1, column)[:, 0]
    return (column if ids is None else ids.gather(1, column))[:, 0], sure


def _leads(scores: Tensor, near: Tensor) -> Tensor:
    """[B] bool: whether the highest of scores [B, K] is more than near [B, 1] above the next."""
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    return first - second > near[:, 0]


def penalize(logits: Tensor, options: Options, seen: Tensor | None, counts: Tensor | None) -> Tensor:
    """Apply the three penalties to [B, V] logits; see SamplingParams."""
    if options.repetition:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        factor = options.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    if options.counts:
        assert counts is not None, "presence and frequency penalties need the counts of generated tokens"
        logits = logits - options.frequency_penalty[:, None] * counts
        logits = logits - options.presence_penalty[:, None] * (counts > 0)
    return logits


Filtered = tuple[Tensor, Tensor, Tensor, Tensor | None]


def keep_most_likely(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, near: Tensor | None = None
) -> Filtered:
    """Ids [B, K] that include the most likely tokens of [B, V] logits, in order, their logits, and which are to be dropped.

    top_k [B] int64 first; then the fewest tokens whose probability, among those left, reaches top_p [B]
    (nucleus sampling, arXiv 1904.09751); then those of at least min_p [B] times the largest probability. The top token
    always stays. Equal logits rank by token id. With `near` [B, 1], also of which ids that changes if differences of logits
    move by as much.
    """
    # On a GPU to ask whether a few suffice would synchronise. What is kept does not depend on how many are sorted.
    size = logits.shape[-1]
    if not logits.is_cuda and size > _FEW and bool(((top_k < _FEW) | (top_k >= size)).all()):
        ids, ranked, dropped, unsure = _rank(logits, _FEW, top_k, top_p, min_p, near)
        # Of the tokens equal to the last one, those with the lowest ids may be missing.
        gone = dropped if unsure is None else dropped & ~unsure
        if bool(gone[ranked == ranked[:, -1:]].all()):
            return ids, ranked, dropped, unsure
    return _rank(logits, size, top_k, top_p, min_p, near)


def _rank(logits: Tensor, count: int, top_k: Tensor, top_p: Tensor, min_p: Tensor, near: Tensor | None) -> Filtered:
    """`keep_most_likely` among the `count` most likely ids, in order."""
    size = logits.shape[-1]
    if count < size:
        ids = logits.topk(count, sorted=False).indices.sort().values
        ranked, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    else:
        ranked, ids = logits.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(count, device=logits.device) >= top_k[:, None]
    # Summed in the order of the ids, so that the sum is the same however many are ranked.
    left = torch.full_like(logits, -math.inf).scatter_(1, ids, ranked.masked_fill(beyond, -math.inf))
    probability = torch.where(top_k[:, None] < size, left, logits).softmax(dim=-1).gather(1, ids)
    before = probability.cumsum(dim=-1).sub_(probability)
    most, least = torch.where(top_p < 1, top_p, math.inf)[:, None], min_p[:, None] * probability[:, :1]
    dropped = beyond | (before >= most) | (probability < least)
    dropped[:, 0] = False
    if near is None:
        return ids, ranked, dropped, None
    # Probabilities move as their logits do and may cross a threshold; tokens as likely as these may swap ranks with them.
    unsure = ((before - most).abs() <= near) | ((probability - least).abs() <= near * least)
    unsure[:, 0] = False
    sure, possible = ((part.sum(dim=-1, keepdim=True)) for part in (~dropped & ~unsure, ~dropped | unsure))
    first, last = (ranked.gather(1, rank.clamp(max=count - 1)) for rank in (sure, possible - 1))
    unsure = (ranked <= first + near) & (ranked >= last - near) & (sure < count)
    return ids, ranked, dropped, unsure


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [B, K] fp32 of token ids [K] or [B, K], for seeds [B] and positions [B] (all int64).

    The same on every device.
    """
    stream = _mix(_mix(seeds) + positions * _GOLDEN)
    bits = _mix(stream[:, None] + (ids + 1) * _GOLDEN)
    # 32 bits, because the smallest of V uniforms decides; below 1, so that the noise is finite.
    uniform = _shift(bits, 32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Increment and finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift; int64's own keeps the sign."""
    return (bits >> by).bitwise_and_(2 ** (64 - by) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = _shift(bits, 30).bitwise_xor_(bits).mul_(_FACTORS[0])
    bits = _shift(bits, 27).bitwise_xor_(bits).mul_(_FACTORS[1])
    return _shift(bits, 31).bitwise_xor_(bits)


def log_probabilities(
    logits: Tensor, tokens: Tensor, num_top: int = 0, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (natural logarithm) of `tokens` and of the most likely ones, before any sampling option.

    logits [B, V] fp32, tokens [N] int64, token i after row rows[i] (None: row i) → chosen [N], top [B, num_top] and
    their ids [B, num_top].
    """
    logs = logits.log_softmax(dim=-1)
    top, ids = logs.topk(min(num_top, logits.shape[-1]), dim=-1)
    return logs[torch.arange(len(tokens), device=logs.device) if rows is None else rows, tokens], top, ids
