"""Output of `tnllm generate`: text on stdout as it comes, complete texts, JSON lines, and the speed."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm import interrupts
from tnllm.files import format_duration, is_special
from tnllm.progress import Progress, log
from tnllm.tables import print_json

if TYPE_CHECKING:
    from tnllm.generation.jsonl import Request
    from tnllm.generation.samples import Piece, Result

    Events = Iterable[Piece | Result]


def show(text: str) -> None:
    """Write generated text. A terminal gets no control characters, which could corrupt it; a file gets every byte."""
    print(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


# All but tab and newline.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Meter:
    """Speed of one run. The clock starts with the constructor."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._tokens = self._prompt_tokens = 0
        self._last: Result | None = None

    def watch(self, events: "Events") -> Iterator["Piece | Result"]:
        from tnllm.generation.samples import Result

        for event in events:
            interrupts.check()
            if isinstance(event, Result):
                self._last = event
                self._prompt_tokens += event.prompt_tokens if event.sample == 0 else 0
            else:
                self._tokens += 1
                self._first = self._first or time.perf_counter()
            yield event

    def summary(self, single: bool = True) -> str:
        """Tokens, tokens/s after the first, time to the first; for a `single` sample its finish reason and seed."""
        if self._first is None:
            elapsed = format_duration(time.perf_counter() - self._start)
            text = f"no tokens generated; read {self._prompt_tokens} in {elapsed}"
        else:
            seconds = time.perf_counter() - self._first
            rate = f" at {(self._tokens - 1) / seconds:.1f} tokens/s" if self._tokens > 1 and seconds else ""
            text = f"{self._tokens} tokens{rate}, first after {self._first - self._start:.2f}s"
            if self._prompt_tokens:
                text += f"; prompt {self._prompt_tokens} tokens"
        if single and self._last and self._first:
            text += f"; ended by {self._last.finish_reason}; seed {self._last.seed}"
        return text


def stream_text(events: "Events", echo: str) -> "Result":
    """Print `echo` and the text of one sample as it comes; ends the line even if interrupted."""
    from tnllm.generation.samples import Piece

    try:
        show(echo)
        for event in events:
            if not isinstance(event, Piece):
                return event
            if event.text:
                show(event.text)
    finally:
        print(flush=True)
    raise AssertionError("a sample ends with its result")


def in_order(events: "Events", samples: Sequence[int]) -> "Iterator[Result]":
    """Results by prompt, then by sample, each as soon as those before it are complete; `samples`: number per prompt."""
    from tnllm.generation.samples import Result

    waiting: dict[tuple[int, int], Result] = {}
    keys = ((index, sample) for index, count in enumerate(samples) for sample in range(count))
    expected = next(keys, None)
    for event in events:
        if isinstance(event, Result):
            waiting[event.index, event.sample] = event
            while expected in waiting:
                yield waiting.pop(expected)
                expected = next(keys, None)


def print_results(events: "Events", samples: int, echo: str, as_json: bool) -> "Result":
    """Print each sample when it is complete, as text or a JSON object; returns the first.

    Before each of several texts a line on stderr names it.
    """
    from tnllm.generation.jsonl import result_object

    results = []
    for result in in_order(events, [samples]):
        results.append(result)
        if as_json:
            print_json(result_object(result, echo))
            continue
        if samples > 1:
            log(f"sample {result.sample + 1} of {samples}, seed {result.seed}:")
        show(echo + result.text + "\n")
    return results[0]


def print_batch(events: "Events", requests: "Sequence[Request]", echo: bool) -> None:
    """Print one JSON line per result, in the order of the requests."""
    with Progress() as progress:
        for row in _rows(events, requests, 0, echo, progress):
            print_json(row)


def write_batch(
    run: "Callable[[Sequence[Request]], Events]",
    requests: "Sequence[Request]",
    output: Path,
    identity: dict[str, str],
    echo: bool,
) -> None:
    """Write one JSON line per result, in the order of the requests, to `output`; resumes what was stopped.

    `run` generates for the requests that have no results yet. `identity` is `batch_identity` of all.
    """
    from tnllm.generation.jsonl import part_file

    written = total = sum(request.params.n for request in requests)
    try:
        with part_file(output, identity, requests) as (file, first), Progress() as progress:
            written = sum(request.params.n for request in requests[:first])
            if first:
                log(f"resuming: {written} of {total} results are there")
            for row in _rows(run(requests[first:]), requests, first, echo, progress):
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
                written += 1
    except BaseException:
        if written < total and not is_special(output):
            log(f"stopped after {written} of {total} results; run the same command again to resume")
        raise


def _rows(
    events: "Events", requests: "Sequence[Request]", first: int, echo: bool, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Results of requests[first:] as JSON values, in order; `progress` counts those before them too."""
    from tnllm.generation.jsonl import result_object

    counts = [request.params.n for request in requests]
    done, total = sum(counts[:first]), sum(counts)
    for result in in_order(events, counts[first:]):
        index = first + result.index
        request = requests[index]
        yield result_object(replace(result, index=index), request.prompt if echo else "", request.id)
        done += 1
        progress.update("generate", done, total)
