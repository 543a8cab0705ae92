"""`tnllm generate`: continue a text, answer in a chat, or work through a file of prompts."""

import codecs
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tnllm.cli.options import DEVICE, DTYPE, MODEL, examples, log_default_model, panel
from tnllm.cli.streaming import Meter, print_batch, print_results, stream_text, write_batch
from tnllm.errors import UserError
from tnllm.files import check_output_file, is_special, sha256_file
from tnllm.progress import log

if TYPE_CHECKING:
    from tnllm.generation.context import Context
    from tnllm.generation.loading import LoadedModel
    from tnllm.generation.sampler import SamplingParams
    from tnllm.generation.samples import Piece, Result

EPILOG = examples(
    'tnllm generate --prompt "Once upon a time" --max-tokens 100 --temperature 0.8 --seed 1',
    "tnllm generate --chat",
    "tnllm generate --input prompts.jsonl --output answers.jsonl --temperature 0",
    "tnllm generate --prompt-file book.txt --max-tokens 0 --state-out book.state",
    'tnllm generate --state-in book.state --prompt "In short, "',
)
_sampling, _input, _output, _state = map(panel, ("Sampling", "Input", "Output", "State"))


def command(
    model: str | None = MODEL,
    adapter: Path | None = typer.Option(None, help="A LoRA adapter's folder (PEFT's format) to merge into the model."),
    prompt: str | None = _input(None, "--prompt", "-p", help='Text to continue; "" is no text, - reads stdin.'),
    prompt_file: str | None = _input(None, help="UTF-8 file to continue, less a newline at its end; - is stdin."),
    input: str | None = _input(None, help='JSON Lines: {"prompt": ...}, options and an id as you like; - is stdin.'),
    chat: bool = _input(False, "--chat", help="Talk in turns; /save and /load by name, /reset, /exit."),
    chat_template: str | None = _input(None, help=r"Turn format with {prompt}; \n is a newline. Default: the model's."),
    max_tokens: int | None = _sampling(
        None, "--max-tokens", "--max-new-tokens", help="Most tokens; 0 only reads. Default: the model's, or 256."
    ),
    temperature: float | None = _sampling(None, help="0 is the most likely token. All these default to the model's."),
    top_k: int | None = _sampling(None, help="Keep the k most likely tokens; 0 keeps all."),
    top_p: float | None = _sampling(None, help="Keep the most likely tokens whose probabilities sum to this."),
    min_p: float | None = _sampling(None, help="Drop tokens below this share of the top token's probability."),
    repetition_penalty: float | None = _sampling(None, help="Above 1: tokens of prompt and text become less likely."),
    presence_penalty: float | None = _sampling(None, help="-2 to 2, subtracted from the logits of generated tokens."),
    frequency_penalty: float | None = _sampling(None, help="-2 to 2, subtracted once per occurrence."),
    seed: int | None = _sampling(None, help="The same seed gives the same text; sample i of --n has seed + i."),
    stop: list[str] = _sampling([], help=r"End before this text; \n is a newline. Repeatable."),
    n: int | None = _sampling(None, help="Samples for each prompt."),
    ignore_eos: bool = _sampling(False, "--ignore-eos", help="Continue after the end token."),
    prompt_lookup: int | None = _sampling(
        None, help="Most tokens proposed at once from an earlier passage and verified in one pass: 16 suits a CPU."
    ),
    output: Path | None = _output(None, help="Write the results of --input here; run again to resume after a stop."),
    json_: bool = _output(False, "--json", help="One JSON object per result; always so for --input."),
    logprobs: int | None = _output(None, help="With --json: log-probabilities, also of the N most likely tokens."),
    echo: bool = _output(False, "--echo", help="Put the prompt before the text."),
    stream: bool = _output(True, help="Show the text as it comes."),
    state_in: Path | None = _state(None, help="Continue from a saved state."),
    state_out: Path | None = _state(None, help="Save the state after the last token, to continue from."),
    batch_size: int = typer.Option(16, min=1, help="Samples decoded together."),
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Generate text from a prompt, a file, standard input, a batch of prompts or a chat."""
    given = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "n": n, "logprobs": logprobs,
        "stop": [_unescape(text) for text in stop] or None, "ignore_eos": ignore_eos or None,
        "prompt_lookup": prompt_lookup,
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    flags = {"--prompt": prompt, "--prompt-file": prompt_file, "--input": input, "--chat": chat or None}
    source = _source({flag: value for flag, value in flags.items() if value is not None}, state_in)
    is_batch, is_chat, several = source == "--input", source == "--chat", n not in (None, 1)
    if output and not is_batch:
        raise UserError("--output is for --input; redirect stdout instead: tnllm generate ... > file")
    if logprobs is not None and not (json_ or is_batch):
        raise UserError("--logprobs needs --json or --input; plain text cannot show them")
    if state_out and (is_batch or several):
        raise UserError("--state-out saves the state of one text; it cannot be combined with --input or --n")
    if is_chat and (json_ or echo or several):
        raise UserError("--chat cannot be combined with --json, --echo or --n")
    if chat_template is not None and not is_chat:
        raise UserError("--chat-template is for --chat; write the complete text into the prompt instead")
    _check_text(("--prompt", prompt), ("--chat-template", chat_template), *(("--stop", text) for text in stop))

    from tnllm.generation.context import load_context, read_metadata, weights_hash
    from tnllm.generation.loading import load
    from tnllm.generation.sampler import SamplingParams
    from tnllm.generation.slots import check_lookup

    # Bad options, unreadable prompts and states, and unwritable outputs raise before a large model is loaded.
    SamplingParams.of(options)
    file = next((name for name in (prompt_file, input) if name is not None), "-" if prompt == "-" else None)
    data = None if file is None else _read(file)
    text = (prompt or "") if data is None or is_batch else _decode(data, file or "")
    if state_in is not None:
        read_metadata(state_in)
    # A state may be continued in place.
    read = [file if file != "-" else "/dev/stdin", state_in if is_batch else None]
    read += [path for folder in (model, adapter) if folder for path in Path(folder).glob("*")]
    _check_output(output or state_out, is_batch, [Path(path) for path in read if path])
    log_default_model(model)
    ready = load(model, device, dtype, adapter)
    if prompt_lookup:
        check_lookup(ready.model)
    weights = weights_hash(ready.model) if state_in or state_out or output else ""
    context = load_context(state_in, ready.model, weights) if state_in else None
    run = _Run(ready, options, context, batch_size, echo, weights)
    if is_batch:
        _batch(run, input or "", data or b"", output, state_in)
    elif is_chat:
        _chat(run, ready.chat_template if chat_template is None else _unescape(chat_template), state_out)
    else:
        context = _text(run, text, json_, stream, keep_context=state_out is not None)
        if state_out is not None:
            _save_state(state_out, context, weights)


@dataclass
class _Run:
    """The loaded model and what text, batch and chat need besides; the clock of `meter` starts here."""

    ready: "LoadedModel"
    options: dict[str, Any]
    context: "Context | None"
    batch_size: int
    echo: bool
    weights: str  # their hash, where something needs it
    meter: Meter = field(default_factory=Meter)

    def generate(
        self, prompts: list[list[int]], params: "list[SamplingParams]", keep_contexts: bool = False
    ) -> Iterator["Piece | Result"]:
        from tnllm.generation.decoder import generate

        events = generate(
            self.ready.model, self.ready.tokenizer, prompts, params, contexts=[self.context] * len(prompts),
            keep_contexts=keep_contexts, eos_ids=self.ready.eos_ids, batch_size=self.batch_size,
        )  # fmt: skip
        return self.meter.watch(events)


def _batch(run: _Run, name: str, data: bytes, output: Path | None, state_in: Path | None) -> None:
    """Every request of a JSON Lines file."""
    from tnllm.generation.jsonl import Request, batch_identity, read_requests

    requests = read_requests(name, data, run.ready, run.options, start=run.context is None)

    def generate(requests: "Sequence[Request]") -> Iterator["Piece | Result"]:
        return run.generate([request.ids for request in requests], [request.params for request in requests])

    if output is None:
        print_batch(generate(requests), requests, run.echo)
    else:
        state = sha256_file(state_in) if state_in else ""
        identity = batch_identity(run.ready, run.weights, requests, state, run.echo)
        write_batch(generate, requests, output, identity, run.echo)
    log(run.meter.summary(single=False))


def _chat(run: _Run, template: str, state_out: Path | None) -> None:
    """Turns from stdin; the state after the last one is saved, however the chat ends."""
    from tnllm.cli.chat import chat_loop
    from tnllm.generation.conversation import Conversation
    from tnllm.generation.talks import Talks

    conversation = Conversation(run.ready, run.ready.params(**run.options), template, run.context)
    has_ended = False
    try:
        chat_loop(conversation, Talks(run.ready.model, run.weights))
        has_ended = True
    finally:
        if state_out is not None and (has_ended or conversation.messages):
            _save_state(state_out, conversation.context(), run.weights)


def _save_state(path: Path, context: "Context | None", weights: str) -> None:
    from tnllm.generation.context import save_context

    if context is None:
        raise UserError("the chat has no turn, so there is no state to save")
    save_context(path, context, weights)
    log(f"state after {context.num_tokens} tokens saved to {path}")


def _text(run: _Run, text: str, as_json: bool, stream: bool, keep_context: bool) -> "Context | None":
    """Continue one text; returns the context of the first sample if it is to be kept."""
    params = run.ready.params(**run.options)
    if not text:
        log("the prompt is empty: " + ("continuing from the state" if run.context else "starting from the begin token"))
    events = run.generate([run.ready.encode(text, start=run.context is None)], [params], keep_context)
    echo = text if run.echo else ""
    if params.n == 1 and stream and not as_json:
        result = stream_text(events, echo)
    else:
        result = print_results(events, params.n, echo, as_json)
    log(run.meter.summary(single=params.n == 1))
    return result.context


def _source(given: dict[str, object], state_in: Path | None) -> str:
    """The flag that names the source of the prompts."""
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} were given; give one of them")
    if not given and state_in is None:
        raise UserError("no prompt; give --prompt TEXT, --prompt-file FILE (- is stdin), --input BATCH.jsonl or --chat")
    return next(iter(given), "--prompt")


def _check_output(path: Path | None, is_batch: bool, inputs: list[Path]) -> None:
    """Raise UserError for a file that cannot be written, and for one that is read too."""
    from tnllm.generation.jsonl import part_path

    if path is not None:
        check_output_file(path, "--output" if is_batch else "--state-out", inputs)
        if is_batch and not is_special(path):
            check_output_file(part_path(path), "--output, until it is complete,", inputs)


def _check_text(*given: tuple[str, str | None]) -> None:
    """Raise UserError for bytes of the command line that Python could not decode; `given`: flags and their values."""
    for flag, text in given:
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{flag} holds bytes that are not {sys.getfilesystemencoding().upper()} (character {error.start}), so it "
                "is in another encoding; set the terminal to UTF-8, or convert the text and give it by --prompt-file"
            ) from None


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        # Also from a pipe, as a shell's <(command) is.
        return Path(file).read_bytes()
    except OSError as error:
        what = f"{file!r} cannot be read ({error.strerror})"
        raise UserError(f"{what}; give a UTF-8 text file, or - for stdin") from None


def _decode(data: bytes, file: str) -> str:
    name = "stdin" if file == "-" else file
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is UTF-16 or UTF-32, not UTF-8; convert it, for example with iconv")
    if b"\0" in data[:4]:
        raise UserError(f"{name} is UTF-16 or UTF-32, not UTF-8, or not text at all; give text in UTF-8")
    try:
        text = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert it, for example with iconv") from None
    if not text:
        raise UserError(f'{name} is empty; to start from nothing give --prompt ""')
    return text


def _unescape(text: str) -> str:
    """`\\n` and `\\t`, which are hard to type in a shell; a doubled backslash is one."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)
