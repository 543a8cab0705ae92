import pytest

from tests.cleaning.texts import CHINESE, CLASSICAL, ENGLISH
from tnllm.cleaning.language import identify


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        (CLASSICAL, "zh"),
        ("春眠不覺曉，處處聞啼鳥。", "zh"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。", "ja"),
        (
            "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient.",
            "fr",
        ),
        ("Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.", "ru"),
        ("xqzv brtk wplf gnmh cdsj zzkq vbxp lmtr qwpf hgnk", None),
        ("", None),
    ],
)
def test_identify(text, language):
    found, confidence = identify(text)
    assert 0 <= confidence <= 1
    assert found == language if language else found not in ("en", "zh") or confidence < 0.3
