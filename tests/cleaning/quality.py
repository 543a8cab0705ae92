"""How often each rule of cleaning is right: documents it drops of those that people, or the way they were made, call bad.

    python -m tests.cleaning.quality human PAGES.jsonl         # field label: 1 good, 0 bad
    python -m tests.cleaning.quality planted CORPUS zh 2000    # good text, and the same with noise of known kinds

Run it in a checkout. A false positive is a good document that a rule drops, a false negative a bad one that it lets
pass. Each rule is asked about every document, with the default ranges; in a cleaning run the first one that objects
decides. `alone` counts documents that no other rule drops.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.cleaning import noise
from tnllm.cleaning.language import identify
from tnllm.cleaning.repair import remove_boilerplate, repair
from tnllm.cleaning.rules import check, figures
from tnllm.cleaning.settings import CleanSettings
from tnllm.data.corpus import find_files
from tnllm.data.remote import read_documents

_KINDS = ("shuffled", "gibberish", "lost encoding", "boilerplate page", "keywords", "repetition", "fragment")
_SETTINGS = CleanSettings()


def objections(text: str) -> set[str]:
    """Every rule that drops the text, asked by the steps of cleaning in their order."""
    text = repair(text)
    if not text:
        return {"nothing left"}
    language, confidence = identify(text)
    if language not in _SETTINGS.language.keep:
        return {f"language ({'none' if language == 'zxx' else 'another'})"}
    found = {"language (unsure)"} if confidence < _SETTINGS.language.min_confidence else set()
    kept, removed = remove_boilerplate(text)
    if removed > _SETTINGS.boilerplate.max_share * len(text) or not kept.strip():
        return found | {"boilerplate"}
    values = figures(kept, language)
    limits = _SETTINGS.rules.limits(language)
    return found | {name for name, limit in limits.items() if check(values, {name: limit}) is not None}


def table(good: Sequence[set[str]], bad: Sequence[set[str]]) -> str:
    """One row a rule, those that drop most first, and a row for all of them together."""
    counts = Counter(rule for rules in (*good, *bad) for rule in rules)
    rows = [(rule, lambda rules, rule=rule: rule in rules) for rule, _ in counts.most_common()]
    lines = ["| rule | bad: dropped | good: dropped | false negatives | false positives | alone: bad, good |"]
    lines += ["| --- " * 6 + "|"]
    for rule, drops in [("all together", bool), *rows]:
        hits, wrong = sum(map(drops, bad)), sum(map(drops, good))
        alone = "" if drops is bool else f"{sum(r == {rule} for r in bad)}, {sum(r == {rule} for r in good)}"
        cells = (rule, hits, wrong, f"{1 - hits / len(bad):.1%}", f"{wrong / len(good):.1%}", alone)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def human(path: Path) -> None:
    """By people's labels."""
    sides: dict[str, list[set[str]]] = {"0": [], "1": []}
    for document in read_documents([path]):
        sides[str(document.record["label"])].append(objections(document.text))
    print(f"{path.name}: {len(sides['1'])} good and {len(sides['0'])} bad documents\n")
    print(table(sides["1"], sides["0"]))


def planted(path: Path, language: str, count: int) -> None:
    """By the way the documents were made; the good ones by source, the bad ones by kind of noise."""
    rng = random.Random(noise.SEED)
    texts = [(str(d.record.get("source", path.stem)), d.text) for d in read_documents(find_files([path]))]
    rng.shuffle(texts)
    wanted = [
        item for item in texts if noise.counts_characters(item[1][:400]) == (language == "zh") and len(item[1]) > 100
    ]
    chosen = wanted[:count]
    good = [objections(text) for _, text in chosen]
    limit = 400 if language == "zh" else 1200
    kinds = [_KINDS[number % len(_KINDS)] for number in range(len(chosen))]
    bad = [objections(noise._MAKERS[kind](text[:limit], rng)) for kind, (_, text) in zip(kinds, chosen, strict=True)]
    print(f"{path.name}: {len(good)} documents in {language}, and {len(bad)} excerpts of them with noise\n")
    print(table(good, bad) + "\n")
    _print_parts("good text of", [source for source, _ in chosen], good)
    print()
    _print_parts("noise", kinds, bad)


def _print_parts(title: str, names: Iterable[str], verdicts: Iterable[set[str]]) -> None:
    parts: dict[str, list[set[str]]] = {}
    for name, rules in zip(names, verdicts, strict=True):
        parts.setdefault(name, []).append(rules)
    print(f"| {title} | documents | dropped | most often by |\n| --- | --- | --- | --- |")
    for name, each in sorted(parts.items()):
        reasons = Counter(rule for rules in each for rule in rules).most_common(3)
        by = ", ".join(f"{rule} {n}" for rule, n in reasons)
        print(f"| {name} | {len(each)} | {sum(map(bool, each)) / len(each):.1%} | {by} |")


if __name__ == "__main__":
    if sys.argv[1] == "human":
        human(Path(sys.argv[2]))
    else:
        planted(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 1 << 60)
