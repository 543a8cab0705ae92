import os
import random
import resource
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cleaning import noise
from tests.cleaning.texts import CHINESE, ENGLISH
from tnllm.cleaning.dedup import Match, join, near_pairs, shingles, signatures
from tnllm.cleaning.executor import run_stages
from tnllm.cleaning.pipeline import open_run
from tnllm.cleaning.records import RecordWriter, read_records
from tnllm.cleaning.settings import DedupSection, SlurmSection, only_dedup


def corpus(folder, texts, per_file):
    for start in range(0, len(texts), per_file):
        with RecordWriter(folder / f"part-{start:04d}.jsonl.gz") as lines:
            for number, text in enumerate(texts[start : start + per_file], start):
                lines.write({"id": f"d{number}", "text": text})
    return folder


def dedup(tmp_path, texts, per_file=7, **settings):
    folder = corpus(tmp_path / "in", texts, per_file)
    run = open_run(only_dedup(path=(str(folder),), shard_mb=0.0005, **settings), tmp_path / "out")
    assert run_stages(run.stages, "local", 1, SlurmSection(), lambda progress: None)
    kept = [record["id"] for path in sorted(run.unique.glob("*.gz")) for record in read_records(path)]
    return run, kept


def words(rng, count):
    return " ".join(rng.choice(ENGLISH.split()) + str(rng.randrange(99)) for _ in range(count))


def true_pairs(texts, settings):
    sets = [set(shingles(text, settings).tolist()) for text in texts]
    pairs = {}
    for a, b in combinations(range(len(texts)), 2):
        value = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        if value >= settings.threshold:
            pairs[frozenset((f"d{a}", f"d{b}"))] = value
    return pairs


def test_pairs_are_those_of_brute_force(tmp_path):
    rng = random.Random(3)
    texts = [words(rng, 120) for _ in range(20)]
    for number in range(20):
        parts = texts[number].split()
        for _ in range(number % 7):
            parts[rng.randrange(len(parts))] = "changed"
        texts.append(" ".join(parts))
    texts += [CHINESE, CHINESE.replace("鲁镇", "某镇"), ENGLISH]
    run, kept = dedup(tmp_path, texts)
    truth = true_pairs(texts, DedupSection())
    found = {frozenset((a, b)): s for a, b, s in near_pairs(run.work / "groups.npz", run.work / "signatures")}
    assert found.keys() == truth.keys() and len(truth) > 8
    assert found == pytest.approx(truth, abs=1e-4)
    # The first of each group stays, in order, and so does everything without a duplicate.
    gone = {max(pair, key=lambda name: int(name[1:])) for pair in truth}
    assert kept == [f"d{n}" for n in range(len(texts)) if f"d{n}" not in gone]
    rejected = [r for path in sorted((run.out / "rejected").glob("dedup-*")) for r in read_records(path)]
    assert {record["id"] for record in rejected} == gone
    verdicts = {record["id"]: record["rejected"] for record in rejected}
    assert verdicts["d20"] == {"step": "dedup", "reason": "exact duplicate", "of": "d0", "similarity": 1.0}
    assert verdicts["d41"]["reason"] == "near duplicate" and 0.8 <= verdicts["d41"]["similarity"] < 1


@pytest.mark.slow
def test_parts_change_nothing_but_memory(tmp_path):
    rng = random.Random(4)
    texts = [words(rng, 60) for _ in range(30)]
    texts += [noise.edit(text, rng) for text in texts]
    _, at_once = dedup(tmp_path / "a", texts)
    _, parts = dedup(tmp_path / "b", texts, memory_mb=0.0005)
    assert at_once == parts and len(at_once) < len(texts)


def test_only_exact_duplicates_at_threshold_one(tmp_path):
    texts = [ENGLISH, f"  {ENGLISH.upper()}\n", noise.edit(ENGLISH, random.Random(0)), CHINESE, CHINESE, "", "!?", "!?"]
    _, kept = dedup(tmp_path, texts, threshold=1.0)
    # The empty one is not a document; texts of punctuation are compared as they are.
    assert kept == ["d0", "d2", "d3", "d6"]


@pytest.mark.parametrize("verify", ["exact", "estimate"])
def test_a_corpus_without_duplicates_is_kept(tmp_path, verify):
    run, kept = dedup(tmp_path, [ENGLISH, CHINESE], verify=verify)
    assert kept == ["d0", "d1"]
    assert not list(near_pairs(run.work / "groups.npz", run.work / "signatures"))


def test_estimates_alone(tmp_path):
    texts = [ENGLISH, ENGLISH + " Amen.", CHINESE]
    run, kept = dedup(tmp_path, texts, verify="estimate")
    assert kept == ["d0", "d2"]
    [(_, _, similarity)] = near_pairs(run.work / "groups.npz", run.work / "signatures")
    assert similarity * 256 == round(similarity * 256) and similarity > 0.9


def test_signatures_estimate_similarity():
    settings = DedupSection(num_hashes=1024)
    a = np.arange(1000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    left, right = signatures([a[:800], a[200:]], settings)
    # Standard error at J = 0.6 is sqrt(0.6 * 0.4 / 1024) = 0.015; four of them.
    assert abs((left == right).mean() - 600 / 1000) < 0.06
    assert (signatures([a[:800]], settings)[0] == left).all()
    assert signatures([], settings).shape == (0, 1024)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_join_finds_the_connected_groups(pairs):
    roots = dict(np.transpose(join(np.array(pairs, np.uint64).reshape(-1, 2))).tolist())
    groups = {number: {number} for number in range(31)}
    for a, b in pairs:
        both = groups[a] | groups[b]
        for member in both:
            groups[member] = both
    assert roots == {n: min(group) for n, group in groups.items() if n != min(group)}


def test_grouping_holds_no_file_of_a_shard_open(tmp_path):
    rng = random.Random(6)
    texts = [words(rng, 60) for _ in range(6)]
    folder = corpus(tmp_path / "in", [*texts, *(f"{text} Amen." for text in texts)], 1)
    run = open_run(only_dedup(path=(str(folder),), shard_mb=0.0005), tmp_path / "out")
    *before, group, _ = run.stages
    assert group.name == "group" and run_stages(before, "local", 1, SlurmSection(), lambda progress: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    # Files at once; there are twelve shards.
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 7, hard))
    try:
        group.steps[0].run()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(near_pairs(run.work / "groups.npz", run.work / "signatures"))) == 6


def test_groups_of_all_sizes_list_all_their_pairs(tmp_path):
    rng = random.Random(7)
    texts = [text for size in (1, 2, 3, 3, 5, 101) for text in [words(rng, 40)] * size]
    rng.shuffle(texts)
    run, kept = dedup(tmp_path, texts, per_file=40)
    assert len(kept) == 6
    listed = {frozenset(pair[:2]) for pair in near_pairs(run.work / "groups.npz", run.work / "signatures")}
    expected = {
        frozenset((f"d{a}", f"d{b}"))
        for a, b in combinations(range(len(texts)), 2)
        if texts[a] == texts[b] and texts.count(texts[a]) <= 100
    }
    # Of a group of more than 100 only the pairs that matching found.
    assert expected <= listed and 100 <= len(listed) - len(expected) < 300


@pytest.mark.slow
def test_many_equal_documents_make_few_pairs(tmp_path):
    run, kept = dedup(tmp_path, [ENGLISH] * 60)
    assert kept == ["d0"]
    stage = next(step for step in run.stages if step.name == "match").steps[0]
    assert isinstance(stage, Match)
    assert len(stage._match(0, 0, 1)) <= 2 * 60
