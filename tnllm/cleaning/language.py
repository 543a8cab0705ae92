"""The language of a text, offline, by the model that ships in py3langid.

identify("子曰學而時習之")     # ("zh", 0.9)
"""

import re
from functools import lru_cache
from typing import Any

from tnllm.cleaning.hashing import codepoints, is_cjk
from tnllm.errors import optional_import

# The start of a long text is enough: with four times as much, one of 960 longer texts got another language.
_MAX_CHARS = 1000
_KANA = re.compile("[\u3041-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_MIN_HAN_SHARE = 0.5


@lru_cache(maxsize=1)
def _model() -> Any:
    with optional_import("data", "py3langid"):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """ISO 639 code ("zxx": no language) and the model's confidence.

    Text mostly in Han characters, without kana or hangul, is Chinese without asking the model, which was trained on modern
    prose and labels short or classical texts as Japanese.
    """
    start = text[:_MAX_CHARS]
    characters = "".join(start.split())
    if characters:
        share = float(is_cjk(codepoints(characters)).mean())
        foreign = len(_KANA.findall(characters)) + len(_HANGUL.findall(characters))
        if share >= _MIN_HAN_SHARE and foreign <= 0.02 * len(characters):
            return "zh", share
    language, confidence = _model().classify(start)
    return str(language), float(confidence)
