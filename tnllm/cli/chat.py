"""`tnllm generate --chat`: messages in, answers out, with line editing and history, and talks saved by name.

chat_loop(conversation, Talks(model))
"""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tnllm import interrupts
from tnllm.cli.streaming import Meter, stream_text
from tnllm.errors import UserError
from tnllm.progress import log

if TYPE_CHECKING:
    from tnllm.generation.conversation import Conversation
    from tnllm.generation.talks import Talks

COMMANDS = "/save NAME, /load NAME, /reset and /exit"
# Opens and closes a message of several lines.
_QUOTES = '"""'
_HISTORY_LINES = 1000


def chat_loop(conversation: "Conversation", talks: "Talks") -> None:
    """Take turns until /exit or the end of stdin. Ctrl-C interrupts an answer.

    At the prompt of a terminal Ctrl-C clears the line; the second one in a row raises KeyboardInterrupt. So does the
    first where stdin is not a terminal.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        log(f"the commands are {COMMANDS}; {_QUOTES} begins and ends a message of several lines")
        log("Ctrl-C interrupts an answer or clears the line, Ctrl-D ends the chat")
    interrupted = False
    with _history() if on_terminal else nullcontext():
        while True:
            try:
                message, is_block = _read_message(on_terminal)
                if not is_block and message.strip() == "/exit":
                    return
                interrupted = False
                if is_block or not _is_command(message, conversation, talks):
                    _answer(message, conversation)
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted or not on_terminal:
                    raise
                interrupted = True
                interrupts.handled()
                log("\nCtrl-C again ends the chat")
            except UserError as error:
                # One bad line must not cost a talk; a script is told by the exit code.
                if not on_terminal or error.exit_code != 2:
                    raise
                log(f"tnllm: {error}")


def _answer(message: str, conversation: "Conversation") -> None:
    if not message.strip():
        return
    meter = Meter()
    try:
        # Closed at once, so that the conversation remembers the answer before anything else happens.
        with closing(conversation.ask(message)) as events:
            stream_text(meter.watch(events), "")
    except KeyboardInterrupt:
        interrupts.handled()
        log("answer interrupted")
    else:
        log(meter.summary())


def _is_command(message: str, conversation: "Conversation", talks: "Talks") -> bool:
    """Obey `message` if it is a command."""
    line = message.strip()
    word, _, name = line.partition(" ")
    if word in ("/save", "/load"):
        try:
            path = talks.save(name, conversation) if word == "/save" else talks.load(name, conversation)
        except OSError as error:
            raise UserError(f"{word}: {error.strerror}: {error.filename}") from None
    if word == "/save":
        log(f"saved as {name.strip()}: {path}")
    elif word == "/load":
        log(f"loaded {name.strip()}: {conversation.num_turns} turns, the last one is")
        for role, text in conversation.messages[-2:]:
            log(f"{role}: {text}")
    elif line == "/reset":
        conversation.reset()
        log("conversation cleared")
    elif message.startswith("/") and line.isascii() and not name:
        log(f"{line} is not a command; the commands are {COMMANDS}")
    else:
        return False
    return True


def _read_message(on_terminal: bool) -> tuple[str, bool]:
    """The next message, and whether it was written between triple quotes. Raises EOFError at the end of stdin."""
    first = _read_line("> " if on_terminal else "")
    if not first.lstrip().startswith(_QUOTES):
        return first, False
    lines = [first.lstrip().removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(_read_line(". " if on_terminal else ""))
        except EOFError:
            return "\n".join(lines).strip("\n"), True
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n"), True


def _read_line(prompt: str) -> str:
    if prompt and not sys.stdout.isatty():
        # The answers go to a file; the person still wants a prompt.
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        line = input(prompt)
        line.encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not {error.encoding.upper()} (byte {error.start}); convert it first") from None
    except UnicodeEncodeError as error:
        encoding = sys.stdin.encoding.upper()
        raise UserError(f"stdin holds bytes that are not {encoding} (character {error.start})") from None
    return line


@contextmanager
def _history() -> Iterator[None]:
    """Line editing, and the lines of earlier chats, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tnllm"
    file = folder / "chat_history"
    readline.set_history_length(_HISTORY_LINES)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What people write to a model is theirs alone.
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError as error:
        log(f"no history of earlier chats: {file}: {error.strerror}")
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError as error:
            log(f"the history of this chat is not kept: {file}: {error.strerror}")
