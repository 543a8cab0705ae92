"""The tokenizer of a Hugging Face folder: tokenizer.json, which keeps the file it was built from beside it.

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.save_pretrained(other)        # tokenizer.json, and tokenizer.model for tnllm's commands
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

ORIGINALS = ("tokenizer.model", "transnormer_100k.tiktoken")


class TnllmTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that saves its SentencePiece model or tiktoken vocabulary too."""

    _auto_class = "AutoTokenizer"

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write the tokenizer's files; the original is copied from where this tokenizer was loaded."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        found = {
            name: cached_file(
                self.name_or_path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for name in ORIGINALS
        }  # fmt: skip
        if not any(found.values()):
            logging.get_logger(__name__).warning(
                f"{self.name_or_path} has no {' and no '.join(ORIGINALS)} any more, so {save_directory} has none; "
                "tnllm's commands need it"
            )
        for name, source in found.items():
            target = Path(save_directory) / name
            if source is not None and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
                written = (*written, str(target))
        return written
