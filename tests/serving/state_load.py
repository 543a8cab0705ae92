"""Many states and forks of them under load: is each text the one that it is alone? In float32 on a CPU.

python -m tests.serving.state_load http://127.0.0.1:8000 --states 200 --forks 50

The server must serve the model that ships with tnllm; without keys.
"""

import argparse
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from tnllm.generation.context import read
from tnllm.generation.decoder import generate
from tnllm.generation.samples import Result

TEXT = "The quick brown fox jumps over the lazy dog and the cat in the old house by the river"
WORDS = TEXT.split()


def load(ready, client, num_states, num_forks, num_tokens, workers):
    """(texts, texts that differ): every fork of every state is continued in random order."""
    draw = random.Random(0)
    books = [" ".join(draw.choices(WORDS, k=draw.randrange(20, 120))) for _ in range(num_states)]

    def post(path, **body):
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(workers) as pool:
        ids = list(pool.map(lambda book: post("/v1/states", prompt=book)["id"], books))
        forks = [(state, seed) for state in range(num_states) for seed in range(num_forks)]
        draw.shuffle(forks)

        def text(fork):
            state, seed = fork
            id = post(f"/v1/states/{ids[state]}/fork")["id"]
            answer = post("/v1/completions", state=id, prompt=WORDS[seed % 9], max_tokens=num_tokens, seed=seed)
            assert client.delete(f"/v1/states/{id}").status_code == 200
            return answer["choices"][0]["text"]

        answers = dict(zip(forks, pool.map(text, forks), strict=True))
    different = 0
    for state, book in enumerate(books):
        [context] = read(ready.model, [ready.encode(book)])
        for seed in range(num_forks):
            prompt = ready.encode(WORDS[seed % 9], start=False)
            params = ready.params(max_tokens=num_tokens, seed=seed)
            events = generate(ready.model, ready.tokenizer, [prompt], params, contexts=[context], eos_ids=ready.eos_ids)
            [result] = [event for event in events if isinstance(event, Result)]
            different += result.text != answers[state, seed]
    return len(answers), different


def main():
    from tnllm.generation.loading import load as load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    for name, value in (("states", 200), ("forks", 50), ("tokens", 8), ("workers", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, timeout=3600, limits=httpx.Limits(max_connections=args.workers)) as client:
        count, different = load(load_model(), client, args.states, args.forks, args.tokens, args.workers)
    print(f"{args.states} states x {args.forks} forks: {count} texts, {different} differ from those alone")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
