"""Paths of the files that ship in the package: a sample corpus, its tokenizer and their licences.

sample_corpus()     # .../sample/sample.jsonl.xz: English and Chinese; fields text, lang, source, license
sample_instructions()   # .../sample/instructions.jsonl: questions and answers to fine-tune on
demo_weights()      # .../demo: a small model's weights folder
browser_page()      # .../browser: a page that runs a model in the browser
named("sample")     # sample_corpus(); named("dirty-sample"): .../dirty/pages: text with known noise
tokenizer_model()   # .../tokenizer.model: 8,192 pieces; tokenizer_model("tnllm-64k"): 64,000
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


# Name → file: 8,192 pieces for the demo and the small recipes, 64,000 for 385M parameters and more.
TOKENIZERS = {"tnllm-8k": "tokenizer.model", "tnllm-64k": "tokenizer-64k.model"}


def tokenizer_model(name: str | Path | None = None) -> Path:
    """The SentencePiece model that `name` means: one that ships (None: tnllm-8k), else `name` as a path."""
    packaged = TOKENIZERS.get(str(name or "tnllm-8k"))
    return Path(str(name)) if packaged is None else folder() / packaged


def demo_weights() -> Path:
    """The weights folder of the demo model, trained by `recipes/demo.yaml`."""
    return folder() / "demo"


def browser_page() -> Path:
    """The files of the page that `tnllm convert --to web` writes."""
    return folder() / "browser"


# For messages about a path that is not there.
SHIPPED = "the corpora that ship are called sample and dirty-sample"


def named(name: str | Path) -> Path:
    """The path that a name means: `sample`, `dirty-sample`, `dirty-held-out`, `dirty-evaluation` ship; others are paths.

    They mean the same in every recipe and command that reads text. The dirty sample is text with noise like that of the web
    (JSON Lines; text, id, source, noise). The last two are clean text of the same sources, to measure losses on, and an
    invented evaluation set.
    """
    dirty = folder() / "dirty"
    packaged = {
        "sample": sample_corpus(),
        "dirty-sample": dirty / "pages",
        "dirty-held-out": dirty / "held-out.jsonl.xz",
        "dirty-evaluation": dirty / "evaluation.jsonl",
    }
    return packaged.get(str(name), Path(name))
