"""The synchronous SDK: the asynchronous one, run on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import uvloop

from sagellm_common.client.aio import AsyncClient, Completion, Options, Prompt
from sagellm_common.client.chat_template import Message
from sagellm_common.client.generation import TextOutput
from sagellm_common.client.router import ClusterView, Explanation
from sagellm_common.core.types import ModelInfo
from sagellm_common.rpc.carriers import Choice

T = TypeVar("T")


class Client:
    """`AsyncClient` for code without an event loop; see there. May be used from several threads.

    with Client(router_address) as client:
        print(client.complete("Once upon a time", max_tokens=20).text)
    """

    def __init__(
        self,
        router_address: str,
        *,
        model_path: str | None = None,
        timeout_s: float = 300.0,
        session: Choice = "auto",
    ) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sagellm-client", daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:  # gRPC channels belong to the loop they are made on
            return AsyncClient(router_address, model_path=model_path, timeout_s=timeout_s, session=session)

        self._client = self._run(make())

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[TextOutput]:
        """Outputs as tokens arrive. Closing the generator, or leaving its loop, cancels."""
        outputs = self._client.generate(prompt, **options)
        try:
            while (output := self._run(anext(outputs, None))) is not None:
                yield output
        finally:
            if not self._loop.is_closed():
                self._run(outputs.aclose())

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Generator[TextOutput]:
        return self.generate(messages, **options)

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        return self._run(self._client.complete(prompt, **options))

    def cancel(self, request_id: str) -> None:
        self._run(self._client.cancel(request_id))

    def models(self) -> tuple[ModelInfo, ...]:
        return self._run(self._client.models())

    def topology(self) -> ClusterView:
        return self._run(self._client.topology())

    def explain(self, request_id: str) -> Explanation:
        return self._run(self._client.explain(request_id))

    def close(self) -> None:
        """Cancels generations in flight and ends the thread. Idempotent."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for `work`, whose own deadlines bound the wait. An interrupt (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
