"""Conversations saved by name, each as a state file that holds the messages too.

talks = Talks(loaded.model)
talks.save("holidays", conversation)
talks.load("holidays", conversation)     # a conversation with the same model
"""

import json
import os
import re
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from tnllm.errors import UserError, did_you_mean
from tnllm.files import check_output_file
from tnllm.generation.context import load_context, read_metadata, save_context, weights_hash
from tnllm.generation.conversation import Conversation
from tnllm.modeling.model import LanguageModel

_SUFFIX = ".state"
_Messages = TypeAdapter(list[tuple[Literal["user", "assistant"], str]])


def default_folder() -> Path:
    """Where a user's talks are: $XDG_DATA_HOME/tnllm/chats, by default below ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tnllm" / "chats"


class Talks:
    """The saved talks of one folder, for one model."""

    def __init__(self, model: LanguageModel, weights: str = "", folder: Path | None = None) -> None:
        """`weights` is `weights_hash(model)` where it is known; it takes a while, so it is computed when it is needed."""
        self._model, self._weights, self._folder = model, weights, folder or default_folder()
        # The talk that this session saved or loaded last, which it may replace.
        self._own = ""

    def names(self) -> list[str]:
        return sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))

    def save(self, name: str, conversation: Conversation) -> Path:
        """Save all turns. Raises UserError for a bad name, no turn, and for the name of another talk."""
        path = self._path(name)
        if not conversation.messages:
            raise UserError("there is nothing to save yet")
        if path.exists() and path.stem != self._own:
            raise UserError(f"there is a talk named {path.stem} already; choose another name, or remove {path}")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_output_file(path, "the talk's file")
        context = conversation.context()
        assert context is not None
        save_context(path, context, self._hash(), messages=json.dumps(conversation.messages))
        self._own = path.stem
        return path

    def load(self, name: str, conversation: Conversation) -> Path:
        """Continue a saved talk. Raises UserError for an unknown name and for the talk of another model."""
        path = self._path(name)
        if not path.is_file():
            names = self.names()
            saved = f"there are {', '.join(names)}" if names else "none is saved yet"
            raise UserError(f"there is no talk named {path.stem}; {saved}{did_you_mean(path.stem, names)}")
        context = load_context(path, self._model, self._hash())
        try:
            messages = _Messages.validate_json(read_metadata(path).get("messages", "[]"))
        except ValueError:
            raise UserError(f"{path} is damaged: its messages cannot be read; remove it") from None
        conversation.restore(context, messages)
        self._own = path.stem
        return path

    def _path(self, name: str) -> Path:
        name = name.strip()
        # A file's name has at most 255 bytes, and a letter up to 4.
        if not re.fullmatch(r"\w[\w-]{0,59}", name):
            raise UserError(f"a talk's name is letters, digits, - and _, at most 60, not {name!r}")
        return self._folder / f"{name}{_SUFFIX}"

    def _hash(self) -> str:
        self._weights = self._weights or weights_hash(self._model)
        return self._weights
