"""The model for lm-evaluation-harness: its LM interface, with shared prefixes and recurrent states.

    from tnllm.evaluation.harness import TransNormerLM            # registers "tnllm"
    lm = TransNormerLM("runs/tiny")
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
    lm_eval.simple_evaluate(model="tnllm", model_args="pretrained=runs/tiny,dtype=bfloat16", tasks=["arc_easy"])

Nothing is truncated: the state holds a text of any length, so contexts have no limit and rolling log-likelihoods no
windows. Under torchrun each rank answers its share of the questions.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from tnllm import __version__, chat_template
from tnllm.chat_template import Segment
from tnllm.evaluation.answer_cache import AnswerCache
from tnllm.evaluation.generate_until import SharedPrefix, sampling_params
from tnllm.evaluation.prompt_encoding import LineEncoder, encode_pairs
from tnllm.generation.context import weights_hash
from tnllm.generation.decoder import BATCH_SIZE, Result, generate
from tnllm.generation.loading import LoadedModel, load
from tnllm.generation.prefix_tree import Request
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.scoring import Scorer

Progress = Callable[[str, int, int], None]  # kind of request, done, total


@register_model("tnllm")
class TransNormerLM(TemplateLM):
    """A tnllm model as the harness's LM. Up to rounding, answers do not depend on batches or sharing."""

    def __init__(
        self,
        pretrained: str | Path | LoadedModel | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int | None = None,
        share_prefix: bool = True,
        cache_dir: str | Path | None = None,
        seed: int = 1234,
        log: Callable[[str], None] = lambda text: None,
        progress: Progress = lambda kind, done, total: None,
    ) -> None:
        """`pretrained`: a run, step or weights folder, or a model in memory; None: the model that ships in the package.

        `batch_size`: auto (by tokens and memory) or the most texts per batch; `batch_tokens`: the most tokens per batch.
        `cache_dir` keeps answers on disk. Raises UserError for a folder that is not a model or has no tokenizer.
        """
        super().__init__()
        self._join_ranks()
        if device in (None, "auto", "cuda") and self.world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.ready = pretrained if isinstance(pretrained, LoadedModel) else load(pretrained, device or "auto", dtype)
        self.share_prefix = share_prefix in (True, "True", "true", 1)
        rows = None if batch_size in (None, "auto") else int(str(batch_size).removeprefix("auto:"))
        if max_batch_size is not None:
            rows = min(rows or max_batch_size, int(max_batch_size))
        self._rows = rows
        self.scorer = Scorer(self.ready.model, self.share_prefix, batch_tokens, rows, log)
        self.weights_sha256 = weights_hash(self.ready.model)
        self._seed, self._progress, self._log = seed, progress, log
        self._encode = LineEncoder(self.ready.tokenizer)
        self.longest = self.num_cached = self.num_requests = 0
        # What `apply_chat_template` gave, up to the last mark: in other texts the same characters are no marks.
        self._conversations: set[str] = set()
        self.cache = AnswerCache(Path(cache_dir), self.identity()) if cache_dir is not None else None

    def identity(self) -> dict[str, Any]:
        """Everything besides the prompt that an answer depends on."""
        ready = self.ready
        return {
            "weights": self.weights_sha256, "tokenizer": ready.tokenizer.sha256, "bos": [ready.bos_id, ready.add_bos],
            "eos": ready.eos_ids, "sampling": ready.sampling, "dtype": ready.model.dtype_name,
            "device": ready.model.device.type, "share_prefix": self.share_prefix, "tnllm": __version__,
        }  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Counts of this rank so far; tokens of cached answers do not count."""
        return {
            "tokens_computed": self.scorer.num_tokens, "tokens_one_by_one": self.scorer.plain_tokens,
            "longest_tokens": self.longest, "requests": self.num_requests, "requests_from_cache": self.num_cached,
        }  # fmt: skip

    # Properties that the harness reads.

    @property
    def eot_token_id(self) -> int:
        return self.ready.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Begin token: the context of a text that has none."""
        return self.ready.bos_id

    @property
    def device(self) -> torch.device:
        return self.ready.model.device

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request cache."""
        return f"tnllm-{self.ready.tokenizer.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        model = self.ready.model
        return {
            "model_num_parameters": model.num_parameters, "model_dtype": model.dtype_name,
            "model_revision": "", "model_sha": self.weights_sha256,
        }  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text or of what `apply_chat_template` returned; the begin token first if the model wants one.

        The name of a control token in a text is text; only a conversation's own marks become end tokens.
        """
        ids = chat_template.encode(self._segments(string), self._encode, self.ready.tokenizer.eos_id)
        begin = self.ready.add_bos if add_special_tokens is None else add_special_tokens
        return [self.ready.bos_id, *ids] if begin else ids

    # Chats.

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's turn format."""
        return self.ready.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's turns, as a string for `tok_encode`: end tokens and prompts' ends are marks in it.

        Without `add_generation_prompt` the last answer does not end yet. Raises UserError unless user and assistant take
        turns after an optional system message.
        """
        messages = [(turn["role"], turn["content"]) for turn in chat_history]
        segments = chat_template.render(self.ready.chat_template, messages, open_answer=not add_generation_prompt)
        marked = chat_template.to_marked(segments)
        self._conversations.update(marked[:end] for end in chat_template.ends_of_segments(marked)[-1:])
        return marked

    def _segments(self, string: str) -> list[Segment]:
        """The conversation that `string` starts with, if it does, and the text after it, whatever characters it has."""
        ends = chat_template.ends_of_segments(string) if self._conversations else []
        end = next((end for end in reversed(ends) if string[:end] in self._conversations), 0)
        conversation = chat_template.from_marked(string[:end]) if end else []
        text = Segment(string[end:], is_answer=True, eos=False)
        return [*conversation, text] if text.text or not conversation else conversation

    def shown(self, text: str) -> str:
        """What `apply_chat_template` returned, for people: the name of the end token in place of its mark."""
        eos = self.ready.tokenizer.piece(self.ready.tokenizer.eos_id)
        return "".join(segment.text + (eos if segment.eos else "") for segment in self._segments(text))

    # Log-likelihoods.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) for each continuation."""
        answers = self._answers("loglikelihood", [request.args for request in requests], self._score_pairs)
        return [(logprob, greedy) for logprob, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each complete text after the begin token; every token sees all tokens before it."""
        return self._answers("loglikelihood_rolling", [request.args for request in requests], self._score_texts)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        answers = dict(self._score("loglikelihood", pairs))
        return [answers[index] for index in range(len(pairs))]

    def _score(self, kind: str, requests: Sequence[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        self.longest = max([self.longest, *(len(each.context) + len(each.continuation) for each in requests)])
        for score in self.scorer.score(requests, lambda done, total: self._progress(kind, done, total)):
            yield score.index, (float(score.logprobs.sum()), score.greedy)

    def _score_pairs(self, arguments: list[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        yield from self._score("loglikelihood", encode_pairs(arguments, self.tok_encode, self.prefix_token_id))

    def _score_texts(self, arguments: list[tuple[str]]) -> Iterator[tuple[int, float]]:
        ids = [self.tok_encode(text, add_special_tokens=False) for (text,) in arguments]
        nonempty = [index for index, text in enumerate(ids) if text]
        yield from ((index, 0.0) for index, text in enumerate(ids) if not text)
        requests = [Request([self.prefix_token_id], ids[index]) for index in nonempty]
        for number, (logprob, _) in self._score("loglikelihood_rolling", requests):
            yield nonempty[number], logprob

    # Generation.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated text after each context, up to the first stop string; greedy unless the settings ask for sampling."""
        return self._answers("generate_until", [request.args for request in requests], self._generate)

    def _generate(self, arguments: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, str]]:
        ready = self.ready
        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text, _ in arguments]
        eos = ready.tokenizer.piece(ready.tokenizer.eos_id)
        params = [sampling_params(settings, ready.sampling, eos) for _, settings in arguments]
        repeats: Counter[tuple[str, SamplingParams]] = Counter()
        for index, (text, _) in enumerate(arguments):
            # A repeated prompt gets another seed, so that its samples differ.
            key = text, params[index]
            params[index] = replace(params[index], seed=self._seed + repeats[key])
            repeats[key] += 1
        self.longest = max([self.longest, *map(len, prompts)])
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        rows = self._rows or (BATCH_SIZE if ready.model.device.type == "cpu" else 4 * BATCH_SIZE)
        done, prefix = 0, SharedPrefix(ready.model, self.share_prefix)
        for start in range(0, len(order), rows):
            group = order[start : start + rows]
            shared, context = prefix.of([prompts[index] for index in group])
            self.scorer.plain_tokens += sum(len(prompts[index]) for index in group)
            self.scorer.num_tokens += sum(len(prompts[index]) - shared for index in group)
            events = generate(
                ready.model, ready.tokenizer, [prompts[index][shared:] for index in group],
                [params[index] for index in group], contexts=[context] * len(group), eos_ids=ready.eos_ids,
                batch_size=rows,
            )  # fmt: skip
            for event in events:
                if isinstance(event, Result):
                    done += 1
                    self._progress("generate_until", done, len(order))
                    yield group[event.index], event.text
        self.scorer.num_tokens += prefix.num_tokens

    # The answer cache.

    def _answers(
        self, kind: str, arguments: list[Any], compute: Callable[[Any], Iterator[tuple[int, Any]]]
    ) -> list[Any]:
        keys = [AnswerCache.key(kind, each) for each in arguments]
        for index, each in enumerate(arguments):
            if kind == "generate_until" and sampling_params(each[1], self.ready.sampling).temperature > 0:
                # Samples are never cached, so that repeated requests differ.
                keys[index] = f"sample {index}"
        cached = [key for key in keys if not key.startswith("sample")]
        answers = self.cache.get(cached) if self.cache else {}
        self.num_requests += len(keys)
        self.num_cached += sum(key in answers for key in keys)
        if answers:
            left = sum(key not in answers for key in keys)
            self._log(f"{kind}: {len(keys) - left:,} of {len(keys):,} answers are in the cache, {left:,} are left")
        todo = {key: each for key, each in zip(keys, arguments, strict=True) if key not in answers}
        todo_keys = list(todo)
        try:
            for index, answer in compute(list(todo.values())) if todo else ():
                answers[todo_keys[index]] = answer
                if self.cache and not todo_keys[index].startswith("sample"):
                    self.cache.put(todo_keys[index], answer)
        finally:
            if self.cache:
                self.cache.flush()
        return [answers[key] for key in keys]

    # Ranks.

    def _join_ranks(self) -> None:
        """Set rank and world size under torchrun."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            if not dist.is_initialized():
                # gloo is enough: only counts, samples and metrics are exchanged.
                dist.init_process_group("gloo")
            self._rank, self._world_size = dist.get_rank(), world_size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return one number of each rank: [world size]."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor, device="cpu") for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.cpu())
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return every rank's object on `dst`, None elsewhere."""
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
