"""The models of a server: the one that it was started with, and others by name.

models = Models("demo", engine, {"legal": other_engine})
served = models.named("legal")                  # raises RequestError for a name that is not served
served = models.chosen(body.model, stored)      # that of a state, if one is given
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tnllm.generation.grammar import Grammars
from tnllm.serving.bodies import RequestError, shown
from tnllm.serving.engine import Engine
from tnllm.serving.states import Stored


@dataclass(frozen=True)
class Served:
    """A model under its name."""

    name: str
    engine: Engine
    grammars: Grammars

    @property
    def fingerprint(self) -> str:
        """It changes with the weights."""
        return f"fp_{self.engine.weights[:12]}"


class Models:
    def __init__(self, name: str, engine: Engine, others: Mapping[str, Engine]) -> None:
        """The first is used where a request names none. All have one tokenizer."""
        grammars = Grammars(engine.loaded.tokenizer, engine.loaded.eos_ids)
        self._models = {name: Served(name, one, grammars) for name, one in {name: engine, **others}.items()}
        self.first = self._models[name]

    def __iter__(self) -> Iterator[Served]:
        return iter(self._models.values())

    def named(self, name: str | None) -> Served:
        """The model of that name; the first for None. Raises RequestError."""
        served = self.first if name is None else self._models.get(name)
        if served is None:
            names = ", ".join(map(repr, self._models))
            message = f"model is {shown(name)}; this server has {names}"
            raise RequestError(message, "model", "model_not_found", 404)
        return served

    def of(self, stored: Stored) -> Served:
        return next(one for one in self if one.engine.weights == stored.content.weights)

    def chosen(self, name: str | None, stored: Stored | None) -> Served:
        """The model of a request, which may continue a state. Raises RequestError if they do not fit."""
        served = self.of(stored) if stored is not None and name is None else self.named(name)
        if stored is not None and served.engine.weights != stored.content.weights:
            message = f"model is {shown(served.name)}; the state is of {self.of(stored).name!r}"
            raise RequestError(message, "model", "state_of_another_model")
        return served
