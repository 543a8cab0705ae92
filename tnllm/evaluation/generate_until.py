"""Parts of the harness's `generate_until`: its sampling settings, and the common prefix of a batch's prompts.

params = sampling_params({"until": ["\n"], "max_gen_toks": 64}, loaded.sampling)
length, context = SharedPrefix(model, share=True).of(sorted_prompts)    # generate from prompts[i][length:] after `context`
"""

from typing import Any

from tnllm.errors import UserError, did_you_mean
from tnllm.generation.context import Context, read
from tnllm.generation.prefix_tree import MIN_SAVED_TOKENS
from tnllm.generation.sampler import SamplingParams
from tnllm.modeling.model import LanguageModel

# The harness's generation settings → fields of SamplingParams; None: read here.
_GENERATION = {
    "max_gen_toks": "max_tokens", "max_new_tokens": "max_tokens", "max_tokens": "max_tokens", "until": "stop",
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "do_sample": None,
}  # fmt: skip


class SharedPrefix:
    """The common beginning of a batch's prompts, read once, and extended for the next batch where that starts with it."""

    def __init__(self, model: LanguageModel, share: bool) -> None:
        self._model, self._share = model, share
        self._ids: list[int] = []
        self._context: Context | None = None
        self.num_tokens = 0

    def of(self, prompts: list[list[int]]) -> tuple[int, Context | None]:
        """Return the common length of sorted prompts and the context after it; each prompt keeps at least one token."""
        first, last = prompts[0], prompts[-1]
        length = 0
        while length < min(len(first), len(last)) - 1 and first[length] == last[length]:
            length += 1
        if not self._share or length * (len(prompts) - 1) < MIN_SAVED_TOKENS:
            return 0, None
        known = len(self._ids)
        if self._context is None or known > length or first[:known] != self._ids:
            known, self._context = 0, None
        if known < length:
            [self._context] = read(self._model, [first[known:length]], [self._context])
            self.num_tokens += length - known
            self._ids = first[:length]
        return length, self._context


def sampling_params(settings: dict[str, Any], defaults: dict[str, Any], eos: str = "") -> SamplingParams:
    """The harness's generation settings as SamplingParams, as its `hf` model reads them.

    `defaults` are the model's own (its generation_config.json), which apply as in transformers: the repetition penalty
    always, the others if sampling. The text of the end token, `eos`, stops a text too. Raises UserError for an unknown
    setting.
    """
    values = {key: value for key, value in defaults.items() if key != "max_tokens"}
    for key, value in settings.items():
        if key not in _GENERATION:
            allowed = ", ".join(_GENERATION)
            raise UserError(
                f"generation setting {key!r} is not known; allowed: {allowed}{did_you_mean(key, _GENERATION)}"
            )
        name = _GENERATION[key]
        if name is not None and value is not None:
            values[name] = value
    samples = settings.get("do_sample")
    if samples is None:
        samples = (settings.get("temperature") or 0) > 0
    if not samples:
        values["temperature"] = 0
    stop = values.get("stop") or ()
    values["stop"] = tuple(text for text in (*((stop,) if isinstance(stop, str) else stop), eos) if text)
    return SamplingParams.of(values)
