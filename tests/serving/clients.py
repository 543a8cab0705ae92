"""Other people's clients against a running server: `python -m tests.serving.clients [http://127.0.0.1:8000/v1]`.

    pip install langchain-openai litellm
    python -m tests.serving.clients [URL] [langchain] [litellm]

Chat and streams, completions, n, stop, log-probabilities, an answer that is sent back, errors. npm's `openai` is tried by
`clients.mjs` beside this file. Exits with 1 where one of them fails, with 3 where a client is not installed.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata

import openai

QUESTION = "Tell me of the sea."
KEY = os.environ.get("TNLLM_API_KEY", "none")
Check = Callable[[str, str], None]


def _raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def langchain(url: str, model: str) -> None:
    """langchain-openai: ChatOpenAI and OpenAI."""
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI, OpenAI

    settings = {"base_url": url, "api_key": KEY, "model": model, "seed": 1, "max_retries": 0}
    chat = ChatOpenAI(**settings, max_completion_tokens=12)
    answer = chat.invoke(QUESTION)
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == answer.text
    assert answer.usage_metadata["output_tokens"] <= 12
    # Its own answer, with everything that langchain keeps beside the text.
    chat.invoke([HumanMessage(QUESTION), answer, HumanMessage("And then?")])
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert all(len(entry["top_logprobs"]) == 2 for entry in scored.response_metadata["logprobs"]["content"])
    assert len(chat.generate([[HumanMessage(QUESTION)]], n=2).generations[0]) == 2
    assert "e" not in chat.invoke(QUESTION, stop=["e"]).text
    assert len(chat.batch([QUESTION, "Who?"])) == 2
    text = OpenAI(**settings, max_tokens=8)
    assert text.invoke("The sea") == "".join(text.stream("The sea"))
    _raises(openai.BadRequestError, lambda: chat.bind(temperature=-1).invoke(QUESTION))
    _raises(openai.BadRequestError, lambda: chat.bind(tools=[{"type": "function"}]).invoke(QUESTION))


def litellm(url: str, model: str) -> None:
    """litellm: its `openai/` and `text-completion-openai/` routes."""
    # Otherwise it asks the network for prices when it is imported.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm as client

    client.suppress_debug_info = True
    settings = {"api_base": url, "api_key": KEY, "seed": 1, "max_retries": 0, "num_retries": 0}
    chat = {**settings, "model": f"openai/{model}", "max_tokens": 12}
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.completion(messages=messages, **chat)
    parts = [
        chunk.choices[0].delta.content or "" for chunk in client.completion(messages=messages, stream=True, **chat)
    ]
    assert "".join(parts) == answer.choices[0].message.content
    client.completion(messages=[*messages, answer.choices[0].message, *messages], **chat)
    client.completion(messages=[*messages, answer.choices[0].message.model_dump(), *messages], **chat)
    several = client.completion(messages=messages, n=2, stop=["e"], logprobs=True, top_logprobs=2, **chat)
    assert len(several.choices) == 2 and all("e" not in choice.message.content for choice in several.choices)
    assert all(len(entry.top_logprobs) == 2 for entry in several.choices[0].logprobs.content)
    text = {**settings, "model": f"text-completion-openai/{model}", "max_tokens": 8}
    done = client.text_completion(prompt=["The sea", "The king"], logprobs=1, **text)
    assert len(done.choices) == 2
    _raises(client.BadRequestError, lambda: client.completion(messages=messages, temperature=-1, **chat))
    _raises(client.NotFoundError, lambda: client.completion(messages=messages, **{**chat, "model": "openai/other"}))


CLIENTS: dict[str, tuple[str, Check]] = {"langchain": ("langchain-openai", langchain), "litellm": ("litellm", litellm)}


def main() -> None:
    """Run the clients named on the command line, or all."""
    arguments = sys.argv[1:]
    url = arguments.pop(0) if arguments and arguments[0] not in CLIENTS else "http://127.0.0.1:8000/v1"
    model = openai.OpenAI(base_url=url, api_key=KEY).models.list().data[0].id
    code = 0
    for name in arguments or CLIENTS:
        package, check = CLIENTS[name]
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"missing: pip install {package}", file=sys.stderr)
            code = code or 3
            continue
        try:
            check(url, model)
            print(f"ok: {package} {version}")
        except Exception:
            traceback.print_exc()
            print(f"failed: {package} {version}")
            code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
