"""Answers that a program can read: python examples/answers_in_a_schema.py [URL]

Start a server before, with the extra that it takes: pip install 'tnllm[serve,schema]' && tnllm serve. If TNLLM_API_KEY is
set, it is sent. Whatever the model knows, its answer fits: a small model fills in nonsense, in the right form.
"""

import json
import os
import re
import sys
from urllib.request import Request, urlopen

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def post(path: str, **body: object) -> dict:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("TNLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    with urlopen(Request(URL + path, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


PERSON = {
    "type": "object",
    "properties": {
        "trade": {"enum": ["smith", "baker", "sailor"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["trade", "age"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Who lived by the river?"}]

# JSON that fits a schema.
form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
answer = post("/v1/chat/completions", messages=QUESTION, response_format=form, seed=1)
person = json.loads(answer["choices"][0]["message"]["content"])
print(f"a {person['trade']} of {person['age']} years")

# A text that matches an expression, and one of several texts.
DATE = "[0-9]{1,2} (May|June) 1[0-9]{3}"
date = post("/v1/completions", prompt="It was on ", structured_outputs={"regex": DATE}, seed=1)
print(re.fullmatch(DATE, date["choices"][0]["text"])[0])
vote = post("/v1/completions", prompt="Will it rain? ", structured_outputs={"choice": ["yes", "no"]}, seed=1)
print(vote["choices"][0]["text"])

# A function that must be called: the answer is its arguments.
tool = {"type": "function", "function": {"name": "introduce", "parameters": PERSON}}
choice = {"type": "function", "function": {"name": "introduce"}}
answer = post("/v1/chat/completions", messages=QUESTION, tools=[tool], tool_choice=choice, seed=2)
[call] = answer["choices"][0]["message"]["tool_calls"]
print(call["function"]["name"], json.loads(call["function"]["arguments"]))
