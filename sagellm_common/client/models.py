"""Which models the cluster serves, with their tokenizers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sagellm_common.client.router import RouterClient
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.clock import Clock, SystemClock
from sagellm_common.core.errors import NoWorker, SageError, UnknownModel
from sagellm_common.core.types import ModelInfo


@dataclass(frozen=True, slots=True)
class ServedModel:
    info: ModelInfo
    tokenizer: Tokenizer


class ModelDirectory:
    """Answers from memory for `ttl_s`, then asks the router again; asks at once for a name it does not know.

    `model_path` is where the tokenizer is read, for a machine that does not have the workers' path.
    """

    def __init__(
        self, router: RouterClient, *, model_path: str | None = None, ttl_s: float = 5.0, clock: Clock | None = None
    ) -> None:
        self._router = router
        self._model_path = model_path
        self._ttl_s = ttl_s
        self._clock = clock or SystemClock()
        self._models: dict[str, ModelInfo] = {}
        self._fresh_until = float("-inf")
        self._tokenizers: dict[str, Tokenizer] = {}
        self._refreshing = asyncio.Lock()
        self._answers = 0
        self._failure: SageError | None = None
        self._loading = asyncio.Lock()

    async def list(self) -> tuple[ModelInfo, ...]:
        """At most `ttl_s` old. Raises what ListModels raises."""
        if self._clock.now() >= self._fresh_until:
            await self._refresh()
        return tuple(self._models.values())

    async def info(self, name: str = "") -> ModelInfo:
        """The model called `name`; without a name, the only one there is.

        Raises NoWorker before any worker has joined, UnknownModel naming those there are.
        """
        models = await self.list()
        if not models or (name and name not in self._models):
            await self._refresh()
        if not self._models:
            raise NoWorker("no model is served yet: no worker has joined the cluster", retry_after_s=1.0)
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            served = ", ".join(sorted(self._models))
            raise UnknownModel(f"model {name!r} is not served here; served: {served}")
        return self._models[name]

    async def get(self, name: str = "") -> ServedModel:
        """As `info`, with the tokenizer. Raises ConfigError when it cannot be read."""
        info = await self.info(name)
        path = self._model_path or info.path
        if path not in self._tokenizers:
            async with self._loading:
                if path not in self._tokenizers:
                    # Off the event loop: a large vocabulary takes a second.
                    self._tokenizers[path] = await asyncio.to_thread(Tokenizer.from_dir, path)
        return ServedModel(info, self._tokenizers[path])

    async def _refresh(self) -> None:
        """Asks the router, one at a time. Who waited for another's answer takes it, also when it is an error: a router
        that is silent costs one timeout, not one after the other."""
        answers = self._answers
        async with self._refreshing:
            if self._answers == answers:
                await self._ask()
            if self._failure is not None:
                raise self._failure

    async def _ask(self) -> None:
        try:
            self._models = {info.name: info for info in await self._router.models()}
            # "No model yet" is not remembered: the first worker may join any moment.
            self._fresh_until = self._clock.now() + self._ttl_s if self._models else float("-inf")
            self._failure = None
        except SageError as err:
            self._failure = err
        self._answers += 1
