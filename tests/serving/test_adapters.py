"""Adapters as models of their own beside the base: texts as alone, states of one model, shared weights and metrics."""

from contextlib import ExitStack

import httpx
import pytest
import torch

from tests.serving.serving import served
from tests.small_models import make_ready, small_model
from tnllm.errors import UserError
from tnllm.generation.decoder import generate
from tnllm.generation.loading import with_adapter
from tnllm.generation.samples import Result
from tnllm.modeling.config import LoraConfig
from tnllm.modeling.lora import add_lora, lora_layers, save_adapter
from tnllm.serving.engine import Engine, Turns
from tnllm.serving.middleware import Settings


def write_adapter(folder, seed):
    model = small_model()
    add_lora(model, LoraConfig(rank=2, alpha=8.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.5, generator=generator)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base = make_ready(small_model(), tokenizer)
    return {
        "small": base,
        **{name: with_adapter(base, write_adapter(folder / name, seed)) for name, seed in (("law", 1), ("sea", 2))},
    }


@pytest.fixture(scope="module")
def client(models):
    with ExitStack() as stack:
        first = stack.enter_context(Engine(models["small"], num_slots=3))
        others = {
            name: stack.enter_context(Engine(ready, num_slots=3, beside=first))
            for name, ready in models.items()
            if name != "small"
        }
        address = stack.enter_context(served(first, Settings(name="small"), others=others))
        yield stack.enter_context(httpx.Client(base_url=address, timeout=300))


def test_only_changed_weights_are_copied(models):
    base = dict(models["small"].model.named_parameters())
    for name in ("law", "sea"):
        own = dict(models[name].model.named_parameters())
        shared = {key for key in base if own[key] is base[key]}
        assert {"embedding.weight", "lm_head.weight"} & set(base) <= shared and len(shared) < len(base)
        assert any(not torch.equal(own[key], base[key]) for key in base)


def test_each_model_answers_by_its_name_as_alone(client, models):
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["small", "law", "sea"] and client.get("/v1/models/sea").json()["id"] == "sea"
    texts = {}
    for name in (None, "small", "law", "sea"):
        body = {"prompt": "The quick", "max_tokens": 20, "seed": 4, "n": 2, "model": name}
        answer = client.post("/v1/completions", json=body).json()
        ready = models[name or "small"]
        events = generate(
            ready.model, ready.tokenizer, [ready.encode("The quick")], ready.params(max_tokens=20, seed=4, n=2)
        )
        alone = sorted((event for event in events if isinstance(event, Result)), key=lambda event: event.sample)
        texts[name] = [choice["text"] for choice in answer["choices"]]
        assert texts[name] == [result.text for result in alone] and answer["model"] == (name or "small")
    assert len({tuple(text) for text in texts.values()}) == 3
    metrics = client.get("/metrics").text
    assert 'tnllm_requests_total{model="law"} 1' in metrics and "tnllm_slots 9" in metrics
    enum = client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]["model"]
    assert enum["anyOf"][0]["enum"] == listed


def test_a_state_is_of_one_model(client):
    body = {"prompt": "The quick brown fox.", "model": "law"}
    state = client.post("/v1/states", json=body).json()
    assert state["model"] == "law"
    more = {"state": state["id"], "max_tokens": 5, "seed": 1}
    read = client.post("/v1/completions", json=more).json()
    again = client.post("/v1/completions", json={**body, "max_tokens": 5, "seed": 1}).json()
    assert read["model"] == "law" and read["choices"][0]["text"] == again["choices"][0]["text"]
    error = client.post("/v1/completions", json={**more, "model": "sea"}).json()["error"]
    assert (error["code"], error["message"]) == ("state_of_another_model", "model is 'sea'; the state is of 'law'")
    fork = client.post(f"/v1/states/{state['id']}/fork", json={"prompt": " So"}).json()
    assert fork["model"] == "law"
    content = client.get(f"/v1/states/{state['id']}/content").content
    binary = {"Content-Type": "application/octet-stream"}
    uploaded = client.post("/v1/states", content=content, headers=binary).json()
    assert uploaded["model"] == "law" and uploaded["tokens"] == state["tokens"]


def test_models_that_are_not_served(client):
    answer = client.post("/v1/completions", json={"prompt": "a", "model": "air"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "model is 'air'; this server has 'small', 'law', 'sea'"


def test_turns_are_given_in_order():
    import threading

    turns, order, ready = Turns(), [], threading.Barrier(2)

    def work(name):
        ready.wait()
        for _ in range(20):
            with turns:
                order.append(name)
                # Another one asks meanwhile.
                threading.Event().wait(0.002)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # While both ask, neither has more than two turns in a row.
    assert len(order) == 40 and "aaa" not in "".join(order[:20]) and "bbb" not in "".join(order[:20])


def test_what_is_no_adapter(models, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is not a folder; give an adapter's folder"):
        with_adapter(models["small"], file)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        with_adapter(models["small"], tmp_path)
