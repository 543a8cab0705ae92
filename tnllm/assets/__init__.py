"""Paths of the files that ship in the package: a sample corpus, its tokenizer and their licences.

sample_corpus()     # .../sample/sample.jsonl.xz: English and Chinese; fields text, lang, source, license
sample_instructions()   # .../sample/instructions.jsonl: questions and answers to fine-tune on
demo_weights()      # .../demo: a small model's weights folder
tokenizer_model()   # .../tokenizer.model: 8,192 pieces, trained by this project's code
"""

from importlib.resources import files
from pathlib import Path


def folder() -> Path:
    """The folder of packaged files. The package is installed unzipped, so it is a real folder."""
    return Path(str(files("tnllm.assets")))


def sample_corpus() -> Path:
    """The bilingual sample corpus (JSON Lines, xz); `NOTICE` beside it names sources and licences."""
    return folder() / "sample" / "sample.jsonl.xz"


def sample_instructions() -> Path:
    """Short questions and answers, English and Chinese, written for this project (JSON Lines, messages)."""
    return folder() / "sample" / "instructions.jsonl"


def tokenizer_model() -> Path:
    """The SentencePiece model of the demo and of the small recipes."""
    return folder() / "tokenizer.model"


def demo_weights() -> Path:
    """The weights folder of the demo model, trained by `recipes/demo.yaml`."""
    return folder() / "demo"
