"""`sagellm doctor handoff`: what became of handoffs, both sides of each put together, and what to do about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from sagellm_common.client.aio import AsyncClient
from sagellm_common.comm_backend.handoff import Side
from sagellm_common.comm_backend.handoff_reason import HandoffReason
from sagellm_common.comm_backend.handoff_record import HandoffRecord, State
from sagellm_common.core.errors import SageError
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.handoffs import list_handoffs
from services.cli.home import ClusterState
from services.cli.render import size

ASK_TIMEOUT_S = 2.0
NOT_HANDOFFS = ("offload:", "store:")
"""Leases of these transfers serve the kv_store."""


@dataclass(frozen=True, slots=True)
class Sided:
    """A record and who told it."""

    worker_id: str
    record: HandoffRecord


@dataclass(frozen=True, slots=True)
class Handoff:
    """One attempt of a request, as far as its sides remember it."""

    source: Sided | None
    target: Sided | None

    @property
    def sides(self) -> tuple[Sided, ...]:
        return tuple(side for side in (self.source, self.target) if side is not None)

    @property
    def any(self) -> HandoffRecord:
        return (self.target or self.sides[0]).record

    @property
    def culprit(self) -> Sided | None:
        """The side whose word on the failure counts; None: it did not fail.

        What the target saw of the source (a lease that was not there, a lost peer) the source itself knows better.
        """
        target, source = self.target, self.source
        source_failed = source is not None and source.record.reason is not None
        if target is None or target.record.state is State.RUNNING:
            return source if source_failed else None
        if target.record.reason is None:
            return None
        return source if source_failed and target.record.reason in _SEEN_FROM_AFAR else target

    @property
    def reason(self) -> HandoffReason | None:
        return self.culprit.record.reason if self.culprit is not None else None

    @property
    def state(self) -> State:
        return (self.culprit.record if self.culprit is not None else self.any).state

    @property
    def source_id(self) -> str:
        if self.source is not None:
            return self.source.worker_id
        return self.target.record.peer_id if self.target is not None else ""

    @property
    def target_id(self) -> str:
        return self.target.worker_id if self.target is not None else ""

    @property
    def age_ms(self) -> float:
        return max(side.record.age_ms for side in self.sides)

    def timeline(self) -> list[tuple[float, str, str]]:
        """(ms since the first event, worker, what), in order. Workers are aligned by when they were asked: what is less
        than a call apart may be told in the wrong order."""
        found = [
            (self.age_ms - side.record.age_ms + event.at_ms, side.worker_id, event.what)
            for side in self.sides
            for event in side.record.events
        ]
        return sorted(found, key=lambda entry: entry[0])


_SEEN_FROM_AFAR = frozenset(
    {
        HandoffReason.LEASE_EXPIRED,
        HandoffReason.EPOCH_FENCED,
        HandoffReason.PEER_LOST_BEFORE_FIRST_BYTE,
        HandoffReason.PEER_LOST_AFTER_FIRST_BYTE,
    }
)


@dataclass(slots=True)
class Findings:
    """`not_asked`: worker → why. `incarnations`: of those that answered."""

    handoffs: list[Handoff] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    incarnations: dict[str, str] = field(default_factory=dict)


# ---- asking ----


async def examine(
    router_address: str, state: ClusterState | None, *, request_id: str = "", last: int = 0, failed: bool = False
) -> Findings:
    """Asks every worker the router knows. Raises SageError when the router does not answer."""
    async with AsyncClient(router_address) as client:
        workers = {worker.record.worker_id: worker.record.address for worker in (await client.topology()).workers}
    found, told, began_s = Findings(), list[Sided](), time.monotonic()
    async with ChannelPool() as channels:

        async def ask(worker_id: str, address: str) -> None:
            asked_s = time.monotonic()
            try:
                channel = channels.get(address)
                answer = await list_handoffs(channel, request_id=request_id, timeout_s=ASK_TIMEOUT_S)
            except SageError as err:
                found.not_asked[worker_id] = f"{err.reason}: {err.message}"
            else:
                found.incarnations[worker_id] = answer[0]
                told.extend(Sided(worker_id, record) for record in answer[1])
                # Ages are of the moment of the answer, taken as half-way between question and answer.
                since_s = began_s - (asked_s + time.monotonic()) / 2
                for record in answer[1]:
                    record.age_ms += since_s * 1e3

        await asyncio.gather(*(ask(worker_id, address) for worker_id, address in workers.items()))
    for process in state.processes if state is not None else ():
        if process.role not in ("router", "gateway") and process.id not in workers:
            found.not_asked[process.id] = "the router does not know it (any more)"
    wanted = [one for one in told if request_id or not one.record.request_id.startswith(NOT_HANDOFFS)]
    handoffs = sorted(joined(wanted), key=lambda one: -one.age_ms)
    if failed:
        handoffs = [one for one in handoffs if one.reason is not None]
    found.handoffs = handoffs[-last:] if last else handoffs
    return found


def joined(told: Sequence[Sided]) -> Iterator[Handoff]:
    """Both sides of each handoff: of the same pin, or else of the same attempt."""
    sources = [one for one in told if one.record.side is Side.SOURCE]
    for target in (one for one in told if one.record.side is Side.TARGET):
        same = [one for one in sources if one.record.request_id == target.record.request_id]
        pin = [one for one in same if one.record.epoch == target.record.epoch]
        attempt = [one for one in same if one.record.attempt == target.record.attempt]
        source = next(iter(pin or attempt), None)
        if source is not None:
            sources.remove(source)
        yield Handoff(source, target)
    yield from (Handoff(source, None) for source in sources)


# ---- explaining ----

_ADVICE: dict[HandoffReason, tuple[str, str]] = {
    HandoffReason.CONNECT_REFUSED: (
        "{source} took no connection on its KV port: it has stopped, or something between the two keeps them apart",
        "see whether {source} runs (`sagellm status`, its log), and that {target} may connect to its data address",
    ),
    HandoffReason.HANDSHAKE_REFUSED: (
        "{source} and {target} are configured for different byte paths",
        "set one transport.backend for the cluster and restart the worker that differs",
    ),
    HandoffReason.LAYOUT_MISMATCH: (
        "the KV of {source} cannot be brought into the layout of {target}",
        "the message names the field and both values; give both the same model and a layout that can be converted",
    ),
    HandoffReason.LEASE_EXPIRED: (
        "the time of the lease at {at} ran out before its blocks were fetched: nobody came for them, or renewed it",
        "look for what held the request up (`sagellm explain`); raise transport.lease_ttl_s if that is normal here",
    ),
    HandoffReason.EPOCH_FENCED: (
        "a newer attempt, or a newer request of the same id, took the place of this one at {at}",
        "nothing: what came late was turned away. Give each request an id of its own if this is frequent",
    ),
    HandoffReason.PEER_RESTARTED: (
        "{source} was restarted after it had computed this KV, which is gone with its old life",
        "the request was tried again; the log of {source} says why it was restarted",
    ),
    HandoffReason.PEER_LOST_BEFORE_FIRST_BYTE: (
        "{source} was lost before it sent anything: it died, or closed the connection",
        "read the last lines of the log of {source}; the request is tried again elsewhere",
    ),
    HandoffReason.PEER_LOST_AFTER_FIRST_BYTE: (
        "{source} was lost while it sent: it died, or the connection broke",
        "read the last lines of the log of {source}; the request is tried again elsewhere",
    ),
    HandoffReason.STALLED: (
        "{source} was connected, but silent for longer than transport.timeout_s",
        "look for a stopped process, a full CPU or a lossy link at {source}; if it is just slow, raise that setting",
    ),
    HandoffReason.DEADLINE: (
        "the request's deadline passed before its KV was at {target}",
        "allow requests more time, or look at queued and transfer times below for what is slow",
    ),
    HandoffReason.DIGEST_MISMATCH: (
        "what arrived at {target} is not what {source} sent: its digest differs. It was thrown away, never used",
        "if it comes again, suspect memory or network of the two hosts",
    ),
    HandoffReason.CANCELLED_BY_CLIENT: (
        "the client called it off, or left before its answer was complete",
        "nothing; if clients leave for want of patience, look at what the requests waited for: `sagellm explain`",
    ),
    HandoffReason.CANCELLED_BY_ROUTER: (
        "the router called it off: another party failed, the deadline passed, or the first token was the last",
        "nothing, unless nobody wanted that: `sagellm explain` says what the router saw",
    ),
    HandoffReason.CANCELLED_BY_PREFILL: (
        "{source} ended the computation without KV to hand over: it failed, or nothing was left to decode",
        "the log of {source} says why, if it failed",
    ),
    HandoffReason.CANCELLED_BY_DECODE: (
        "{target} gave the blocks back without having used them: its side of it failed first",
        "see the record of {target}, or its log if it has none any more",
    ),
    HandoffReason.KV_EXHAUSTED: (
        "{at} had no KV blocks left for this prompt",
        "raise decode.num_blocks (or engine.num_blocks), add a decode worker, or send less at a time",
    ),
    HandoffReason.QUEUE_FULL: (
        "too many pulls were waiting for their turn at {target}",
        "raise transport.max_pulls or transport.max_waiting_pulls, or add a decode worker",
    ),
    HandoffReason.DRAINING: ("{at} was shutting down", "nothing: the request goes to another worker"),
    HandoffReason.ENGINE_FAILED: ("the engine of {at} failed", "the log of {at} has its error"),
    HandoffReason.INVALID_REQUEST: ("what {target} was asked for makes no sense", "the message names the field"),
    HandoffReason.INTERNAL: ("an error that nobody foresaw, at {at}", "the log of {at} has its traceback; report it"),
}


def diagnosis(handoff: Handoff, found: Findings) -> tuple[str, str]:
    """In plain words what happened, and what to do; the latter is empty where nothing is wrong."""
    culprit = handoff.culprit
    if culprit is None or culprit.record.reason is None:
        return _well(handoff), ""
    names = {"source": handoff.source_id or "the prefill worker", "target": handoff.target_id or "the decode worker"}
    said, fix = (text.format(at=culprit.worker_id, **names) for text in _ADVICE[culprit.record.reason])
    target = handoff.target.record if handoff.target is not None else None
    if target is not None and target.peer_id and handoff.source is None:
        now = found.incarnations.get(target.peer_id)
        if now is None:
            said += f". {target.peer_id} could not be asked for its side"
        elif now != target.peer_incarnation:
            said += f". {target.peer_id} was restarted since: its side of it is gone"
    return said, fix


def _well(handoff: Handoff) -> str:
    record = handoff.any
    if record.state is State.RUNNING:
        return "it is under way"
    if handoff.target is None:
        return "the blocks were fetched and given back"
    if not record.bytes:
        return f"nothing had to move: {record.blocks_reused} blocks were at {handoff.target_id} already"
    hidden = f", {record.overlap_share:.0%} of that behind the computation" if record.overlap_share else ""
    return f"{size(record.bytes)} came over {record.backend} in {record.transfer_ms:.1f} ms{hidden}"


# ---- showing ----


def document(found: Findings) -> dict[str, Any]:
    """For `--json`; keys are only ever added."""

    def one(handoff: Handoff) -> dict[str, Any]:
        said, fix = diagnosis(handoff, found)
        sides = {
            name: {"worker_id": side.worker_id, **asdict(side.record)} if side is not None else None
            for name, side in (("source", handoff.source), ("target", handoff.target))
        }
        for side in sides.values():
            if side is not None:
                del side["began_s"]
        return {
            "request_id": handoff.any.request_id,
            "attempt": handoff.any.attempt,
            "state": handoff.state,
            "reason": handoff.reason,
            "failed_at": handoff.culprit.record.failed_at if handoff.culprit is not None else "",
            "diagnosis": said,
            "fix": fix,
            **sides,
        }

    not_asked = [{"id": worker_id, "why": why} for worker_id, why in sorted(found.not_asked.items())]
    return {"handoffs": [one(handoff) for handoff in found.handoffs], "not_asked": not_asked}


def handoffs_table(handoffs: Iterable[Handoff]) -> Table:
    """A line per handoff, the newest last."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("REQUEST", "TRY", "FROM → TO"):
        table.add_column(name, no_wrap=True)
    table.add_column("ENDED", min_width=12)
    for name in ("AGO", "MOVED", "IN", "HIDDEN", "STALLS"):
        table.add_column(name, justify="right", no_wrap=True)
    for handoff in handoffs:
        record, reason = handoff.any, handoff.reason
        ended = f"[yellow]{reason.replace('_', ' ')}[/]" if reason is not None else str(record.state)
        table.add_row(
            escape(record.request_id),
            str(record.attempt),
            f"{handoff.source_id or '–'} → {handoff.target_id or '–'}",
            ended,
            _ago(handoff.age_ms),
            size(record.bytes),
            _ms(record.transfer_ms),
            f"{record.overlap_share:.0%}",
            str(record.stalls),
        )
    return table


def story(handoff: Handoff, found: Findings) -> Iterator[Table | str]:
    """One handoff for a reader: what, why, what to do, and when what happened."""
    said, fix = diagnosis(handoff, found)
    record, mark = handoff.any, "[green]✓[/]" if handoff.reason is None else "[yellow]✗[/]"
    yield f"{mark} [bold]{escape(record.request_id)}[/] attempt {record.attempt}: {handoff.reason or handoff.state}"
    yield f"  {escape(said)}"
    if handoff.culprit is not None and handoff.culprit.record.message:
        yield f"  [dim]{escape(handoff.culprit.worker_id)} says: {escape(handoff.culprit.record.message)}[/]"
    if fix:
        yield f"  [bold]do:[/] {escape(fix)}"
    table = Table(box=None, pad_edge=True, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  AT MS", justify="right")
    table.add_column("WHERE", no_wrap=True)
    table.add_column("WHAT")
    for at_ms, worker_id, what in handoff.timeline():
        table.add_row(f"{at_ms:.1f}", worker_id, escape(what))
    yield table
    facts = (
        f"queued {_ms(record.queued_ms)}",
        f"first byte {_ms(record.first_byte_ms)}",
        f"over {record.backend} ({record.backend_why})",
        f"handshake {_ms(record.handshake_ms)}",
        f"digests {_ms(record.digest_ms)}",
        f"{record.stalls} stalls, the longest {_ms(record.longest_stall_ms)}",
        f"{record.retries} pulls again",
        f"{record.blocks_moved} blocks moved, {record.blocks_reused} reused",
    )
    yield f"  [dim]{escape(' · '.join(facts))}[/]"


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value else "–"


def _ago(age_ms: float) -> str:
    seconds = age_ms / 1e3
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
