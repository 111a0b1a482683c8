"""Several byte paths of one worker as one: each peer is served over the best that both have.

    a peer's paths ──► those we have, too, and that reach it ──► best first ──► pull ──► failed at once? the next one

`transport.backend: auto` opens all paths that work here. With one path this adds nothing but the measuring of links.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from prometheus_client import Counter

from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.comm_backend.protocol import KVTransferChannel, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.core.errors import ConfigError, InvalidRequest, PeerLost
from sagellm_common.core.types import BlockIds, DataPath, KvSource

log = logging.getLogger(__name__)

FALLBACKS = Counter(
    "sagellm_comm_path_fallbacks", "Pulls that went on over another byte path than the best", ["failed", "used"]
)

AVOID_S = 30.0
"""A path to a peer that failed is not tried again for so long."""


@dataclass(frozen=True, slots=True)
class OpenPath:
    """A byte path of this worker. Only peers that say the same `reach` of theirs can be reached; "": all can.

    `why` says, for people, when it is the one to take.
    """

    backend: str
    channel: PullQueue
    reach: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to a peer."""

    path: OpenPath
    source: KvSource
    """As a channel of that path knows it."""

    @property
    def why(self) -> str:
        return self.path.why


class PathsChannel:
    """A `KVTransferChannel` over one or more byte paths, best first, each a `PullQueue`; the last is for every peer.

    `name` and `address` are those of that last one, which peers that know of no others use. `fast_s` is how soon a
    path must fail for the next one to be tried: one that falls silent later has lost its peer, not its way.
    """

    def __init__(
        self,
        paths: list[OpenPath],
        settings: KVTransportConfig,
        links: LinkTable,
        messages: MessagePlanner,
        *,
        fast_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.links = links
        self.messages = messages
        self._paths = paths
        self._base = paths[-1]
        self._fast_s = fast_s
        self._now_s = now_s
        self._avoid: dict[tuple[str, str, str], float] = {}
        """(worker id, incarnation, backend) → until when."""
        self._told: dict[str, str] = {}
        """Worker id → the byte path that the log names last."""
        self.name = self._base.backend
        self.pulls_along = any(path.channel.pulls_along for path in paths)
        self.encodes = any(path.channel.encodes for path in paths)

    @property
    def address(self) -> str:
        return self._base.channel.address

    @property
    def paths(self) -> tuple[DataPath, ...]:
        """What peers are told, from `start` on; () where `name` and `address` say it all."""
        if len(self._paths) == 1:
            return ()
        return tuple(DataPath(path.backend, path.channel.address, path.reach) for path in self._paths)

    @property
    def by_backend(self) -> Mapping[str, KVTransferChannel]:
        return {path.backend: path.channel for path in self._paths}

    def serves(self, backend: str) -> bool:
        """Whether a peer that has only this byte path can be met."""
        return any(path.backend == backend for path in self._paths)

    async def start(self) -> str:
        """Raises what its last path raises. Another one that does not start is left out, with a warning."""
        for path in list(self._paths[:-1]):
            try:
                await path.channel.start()
            except (ConfigError, OSError) as err:
                log.warning("transport.backend auto goes without %s: %s", path.backend, err)
                self._paths.remove(path)
        return await self._base.channel.start()

    async def close(self) -> None:
        for path in self._paths:
            await path.channel.close()

    # ---- receiver ----

    def choices(self, source: KvSource, *, along: bool = False, encoded: bool = False) -> list[Choice]:
        """Ways to the source that can do this, best first; those that failed lately come last.

        Raises ConfigError when the two have no path in common, InvalidRequest when none that can do it.
        """
        only = self._base
        able_alone = (only.channel.pulls_along or not along) and (only.channel.encodes or not encoded)
        alone = len(self._paths) == 1 and not source.paths and (only.backend, only.reach) == (source.backend, "")
        if alone and able_alone:
            return [Choice(only, source)]  # the usual case, for which the rest takes as long as a small pull
        theirs = {path.backend: path for path in source.paths}
        if not theirs:
            theirs = {source.backend: DataPath(source.backend, source.data_address)}
        found = [
            Choice(path, _over(source, theirs[path.backend]))
            for path in self._paths
            if path.backend in theirs and path.reach == theirs[path.backend].reach
        ]
        able = [
            choice
            for choice in found
            if (choice.path.channel.pulls_along or not along) and (choice.path.channel.encodes or not encoded)
        ]
        if found and not able:
            what = "nothing is converted by the source" if encoded else "nothing is pulled along the computation"
            raise InvalidRequest(f"over {', '.join(theirs)} {what}")
        if not found:
            raise ConfigError(
                f"worker {source.worker_id!r} sends KV over {', '.join(theirs)}, and this one receives it over "
                f"{', '.join(path.backend for path in self._paths)}; set one transport.backend for the cluster"
            )
        if not self._avoid:
            return able
        now = self._now_s()
        return sorted(able, key=lambda choice: self._avoid.get(_key(choice), now) > now)

    async def pull(self, asked: Pull) -> TransferResult:
        async def over(choice: Choice, left_s: float) -> TransferResult:
            result = await choice.path.channel.pull(_on(asked, choice, left_s))
            # What is converted on its way tells how fast that is, not the link.
            if not asked.transcoded:
                self.links.observe(asked.source.worker_id, choice.path.backend, result.bytes, result.seconds)
            return result

        choices = self.choices(asked.source, encoded=asked.encoding is not None)
        return await self._first_that_works(choices, over, asked.timeout_s)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        source, told = asked.source, 0

        async def over(choice: Choice, left_s: float) -> TransferResult:
            here = 0

            def count(num_bytes: int) -> None:
                """What an earlier path had brought comes a second time, and is told once."""
                nonlocal here, told
                here += num_bytes
                if here > told:
                    asked.on_bytes(here - told)
                    told = here

            result = await choice.path.channel.pull_along(replace(_on(asked, choice, left_s), on_bytes=count))
            if not asked.transcoded:
                # Its seconds begin with the first byte.
                known = self.links.find(source.worker_id, choice.path.backend)
                latency_s = known.latency_s if known else 0.0
                self.links.observe(source.worker_id, choice.path.backend, result.bytes, result.seconds + latency_s)
            return result

        choices = self.choices(source, along=True, encoded=asked.encoding is not None)
        return await self._first_that_works(choices, over, asked.timeout_s)

    async def _first_that_works(
        self, choices: list[Choice], over: Callable[[Choice, float], Awaitable[TransferResult]], timeout_s: float
    ) -> TransferResult:
        if len(choices) == 1:
            result = await over(choices[0], timeout_s)
            self._tell(choices[0], choices[0].why)
            return result.over(choices[0].path.backend, choices[0].why)
        began_s = self._now_s()
        failed = ""
        for choice, others in zip(choices, range(len(choices) - 1, -1, -1), strict=True):
            tried_s = self._now_s() if failed else began_s
            try:
                result = await over(choice, timeout_s - (tried_s - began_s))
            except (PeerLost, ConfigError) as err:
                if not others or self._now_s() - tried_s > self._fast_s:
                    raise
                now = self._now_s()
                self._avoid = {key: until_s for key, until_s in self._avoid.items() if until_s > now}
                self._avoid[_key(choice)] = now + AVOID_S
                following = choices[len(choices) - others].path.backend
                log.warning(
                    "KV of %s: %s failed, trying %s: %s", choice.source.worker_id, choice.path.backend, following, err
                )
                FALLBACKS.labels(choice.path.backend, following).inc()
                failed = choice.path.backend
                continue
            why = f"{choice.why}; {failed} failed" if failed else choice.why
            self._tell(choice, why)
            return result.over(choice.path.backend, why)
        raise AssertionError("there is always a last choice")

    def _tell(self, choice: Choice, why: str) -> None:
        """In the log, when it is another byte path than before."""
        worker_id, backend = choice.source.worker_id, choice.path.backend
        if len(self._paths) > 1 and self._told.get(worker_id) != backend:
            self._told[worker_id] = backend
            log.info("KV of %s is pulled over %s: %s", worker_id, backend, why)

    def bytes_per_s(self, source: KvSource) -> float:
        """How fast KV comes from there: measured, or as configured until it is; 0: not known."""
        known = self.links.find(source.worker_id, self.choices(source)[0].path.backend)
        return known.bytes_per_s if known else self.settings.now.link_bytes_per_s

    # ---- source ----

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        return await self._base.channel.serve_pull(transfer_id, epoch, block_ids, pair_id)

    def serving(self, backend: str) -> KVTransferChannel:
        """The channel that serves a PullRpc over this byte path; "": the one of peers that know no other.

        Raises InvalidRequest for one that is not open here.
        """
        if backend and backend not in self.by_backend:
            raise InvalidRequest(f"backend is {backend!r}, but KV is served over {', '.join(self.by_backend)} here")
        return self.by_backend[backend or self.name]


Asked = TypeVar("Asked", Pull, PullAlong)


def _on(asked: Asked, choice: Choice, left_s: float) -> Asked:
    """The same of this choice's source, within what time is left."""
    if choice.source is asked.source and left_s == asked.timeout_s:
        return asked
    return replace(asked, source=choice.source, timeout_s=left_s)


def _over(source: KvSource, path: DataPath) -> KvSource:
    """As a channel of that byte path knows it."""
    if (source.backend, source.data_address) == (path.backend, path.address):
        return source
    return replace(source, backend=path.backend, data_address=path.address)


def _key(choice: Choice) -> tuple[str, str, str]:
    return choice.source.worker_id, choice.source.incarnation, choice.path.backend
