"""Many states and forks of them under load: is each text the one that it is alone? In float32 on a CPU.

tnllm serve --device cpu --queue 1024 &
python -m tests.serving.state_load http://127.0.0.1:8000 --states 200 --forks 50

The server must serve the model that ships with tnllm; without keys. A state takes 0.75 MiB there, forks nearly nothing.
"""

import argparse
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from tnllm.generation.context import read
from tnllm.generation.decoder import generate
from tnllm.generation.samples import Result
from tnllm.progress import Progress

TEXT = "The quick brown fox jumps over the lazy dog and the cat in the old house by the river"
WORDS = TEXT.split()


def load(ready, client, num_states, num_forks, num_tokens, workers, report=lambda stage, done, total: None):
    """(texts, texts that differ): every fork of every state is continued in random order. `report` shows how far it is."""
    draw = random.Random(0)
    books = [" ".join(draw.choices(WORDS, k=draw.randrange(20, 120))) for _ in range(num_states)]

    def post(path, **body):
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(workers) as pool:
        ids = []
        for id in pool.map(lambda book: post("/v1/states", prompt=book)["id"], books):
            ids.append(id)
            report("reading", len(ids), num_states)
        forks = [(state, seed) for state in range(num_states) for seed in range(num_forks)]
        draw.shuffle(forks)

        def text(fork):
            state, seed = fork
            id = post(f"/v1/states/{ids[state]}/fork")["id"]
            answer = post("/v1/completions", state=id, prompt=WORDS[seed % 9], max_tokens=num_tokens, seed=seed)
            assert client.delete(f"/v1/states/{id}").status_code == 200
            return answer["choices"][0]["text"]

        answers = {}
        for fork, answer in zip(forks, pool.map(text, forks), strict=True):
            answers[fork] = answer
            report("continuing forks", len(answers), len(forks))
    different = 0
    for state, book in enumerate(books):
        [context] = read(ready.model, [ready.encode(book)])
        for seed in range(num_forks):
            prompt = ready.encode(WORDS[seed % 9], start=False)
            params = ready.params(max_tokens=num_tokens, seed=seed)
            events = generate(ready.model, ready.tokenizer, [prompt], params, contexts=[context], eos_ids=ready.eos_ids)
            [result] = [event for event in events if isinstance(event, Result)]
            different += result.text != answers[state, seed]
        report("comparing", (state + 1) * num_forks, len(forks))
    return len(answers), different


def main():
    from tnllm.generation.loading import load as load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    for name, value in (("states", 200), ("forks", 50), ("tokens", 8), ("workers", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    limits = httpx.Limits(max_connections=args.workers)
    with httpx.Client(base_url=args.url, timeout=3600, limits=limits) as client, Progress() as progress:
        sizes = args.states, args.forks, args.tokens, args.workers
        count, different = load(load_model(device="cpu"), client, *sizes, progress.update)
    print(f"{args.states} states x {args.forks} forks: {count} texts, {different} differ from those alone")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
