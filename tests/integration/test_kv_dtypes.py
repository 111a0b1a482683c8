"""KV that changes its dtype between prefill and decode: what arrives, what it costs in tokens, and that it is told.

LMDeploy in the real services, over gRPC and the byte path. Codes are the engine's own to the bit where both engines
compute from the same input, which is the first layer; below it an engine that quantises has attended to rounded KV.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend.transcode import Transcoder
from sagellm_common.core.config import Config
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import KvConversion, WorkerRole
from sagellm_common.engines import make_engine
from tests.support.engines import Driver, prompts, running_engine
from tests.support.store import kv_store, sees_the_store
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S
from tests.support.workers import Generated, Worker, decode_all, generate, request, test_config, worker

KV = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "kv_quant_bits": 8},
    "int4": {"dtype": "float32", "kv_quant_bits": 4},
}
NEW_TOKENS = 24
LENGTHS = (5, 16, 33, 60, 100, 130)
ALWAYS_AHEAD = "transport.overlap_min_bytes=0"


@asynccontextmanager
async def pair(
    model: Path, prefill: str, decode: str, *settings: str, blocks: tuple[int, int] = (16, 16), store: bool = False
) -> AsyncIterator[tuple[Worker, Worker]]:
    def engine(kv: str, block_size_tokens: int) -> Any:
        section = {"num_blocks": 256, "block_size_tokens": block_size_tokens, "max_prefill_tokens": 48, **KV[kv]}
        return make_engine(Config.model_validate({"model": {"path": str(model)}, "engine": section}))

    config = test_config(*settings)
    async with (
        topology_server(EmbeddedTopology()) as router,
        kv_store(router) if store else nullcontext() as pool,
        worker(WorkerRole.PREFILL, router, engine=engine(prefill, blocks[0]), config=config, store=store) as first,
        worker(WorkerRole.DECODE, router, engine=engine(decode, blocks[1]), config=config, store=store) as second,
    ):
        if pool is not None:
            await sees_the_store(first, second)
        yield first, second


async def overlapped(prefill: Worker, decode: Worker, prompt: list[int], request_id: str) -> Generated:
    """As `generate`, with the pull announced, as the router does it."""
    wanted = request(prompt, NEW_TOKENS, request_id, ignore_eos=True)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(
        wanted,
        1,
        ticket,
        timeout_s=TIMEOUT_S,
        on_started=lambda source: decode.decode_session.pull_ahead(request_id, 1, source, timeout_s=TIMEOUT_S),
    )
    steps = await decode_all(decode, wanted, first.token_ids, first.source)
    tokens = [*first.token_ids, *(token for step in steps for token in step.token_ids)]
    return Generated(tokens, steps[-1].finish_reason, first, steps)


@dataclass(frozen=True, slots=True)
class Said:
    tokens: list[list[int]]

    def agreement(self, other: Said) -> float:
        """Share of tokens before the first that differs: what follows it has another history."""
        same = [
            next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), NEW_TOKENS)
            for mine, theirs in zip(self.tokens, other.tokens, strict=True)
        ]
        return sum(same) / (NEW_TOKENS * len(same))


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> dict[str, Said]:
    """What a single engine with each kind of KV says."""

    async def every() -> dict[str, Said]:
        found = {}
        for kv, section in KV.items():
            async with running_engine(tiny_llama, prefix_caching=False, **section) as driver:
                found[kv] = Said([(await driver.run(prompt, NEW_TOKENS))[0] for prompt in prompts(7, LENGTHS)])
        return found

    return asyncio.run(every())


@dataclass(frozen=True, slots=True)
class Case:
    prefill: str
    decode: str
    settings: tuple[str, ...] = ()
    wire: str = ""
    max_rms: float = 0.0
    """0: nothing may be lost."""
    like: tuple[str, float] | None = None
    """A single engine with this KV says so much of the same, at least. (The model is random: any token is as likely as
    the next, and what rounding changes is changed for good. Engines with fp32 and int8 KV agree in a third.)"""
    ahead: bool = False
    blocks: tuple[int, int] = (16, 16)


INT8 = "int8/float32"
CASES = {
    "fp32 to int8": Case("fp32", "int8", (), INT8, 0.01, ("int8", 0.8)),
    "fp32 to int8, gloo": Case(
        "fp32", "int8", ("transport.backend=gloo",), "float32", 0.01, ("int8", 0.8), blocks=(16, 24)
    ),
    "fp32 to int8, ahead": Case("fp32", "int8", (ALWAYS_AHEAD,), INT8, 0.01, ("int8", 0.8), True, (8, 24)),
    "fp32 to int4": Case("fp32", "int4", (), "int4/float32", 0.15),
    "int8 to fp32": Case("int8", "fp32", (), INT8, 0.0, ("int8", 0.5), blocks=(24, 16)),
    "bf16 to fp32": Case("bf16", "fp32", (), "bfloat16", 0.0, ("bf16", 0.4)),
    "fp32, as bf16": Case("fp32", "fp32", ("transport.wire_dtype=bf16",), "bfloat16", 0.004, ("fp32", 0.8)),
    "fp32, as int8, ahead": Case(
        "fp32", "fp32", ("transport.wire_dtype=int8", ALWAYS_AHEAD), INT8, 0.01, ("fp32", 0.5), True
    ),
    "fp32, as fp8": Case("fp32", "fp32", ("transport.wire_dtype=fp8",), "float8_e4m3fn", 0.05, blocks=(16, 8)),
    "fp32, same, ahead in other blocks": Case("fp32", "fp32", (ALWAYS_AHEAD,), ahead=True, blocks=(24, 16)),
}


@pytest.mark.parametrize("name", CASES)
async def test_tokens_and_what_was_lost(tiny_llama: Path, alone: dict[str, Said], name: str) -> None:
    case = CASES[name]
    async with pair(tiny_llama, case.prefill, case.decode, *case.settings, blocks=case.blocks) as (prefill, decode):
        done = []
        for n, prompt in enumerate(prompts(7, LENGTHS)):
            if case.ahead:
                done.append(await overlapped(prefill, decode, prompt, f"r{n}"))
            else:
                wanted = request(prompt, NEW_TOKENS, f"r{n}", ignore_eos=True)
                done.append(await generate(prefill, decode, wanted))
        for one in done:
            transfer = one.steps[0].transfer
            assert transfer is not None
            assert (transfer.began_ahead_ms > 0) == case.ahead
            conversion = transfer.conversion
            if not case.wire:
                assert conversion is None
                continue
            assert isinstance(conversion, KvConversion)
            assert conversion.wire_dtype == case.wire
            assert conversion.non_finite == 0
            assert (conversion.relative_rms_error > 0) == (conversion.max_abs_error > 0) == (case.max_rms > 0)
            assert conversion.relative_rms_error <= case.max_rms
        said = Said([one.tokens for one in done])
        print(f"{name}: " + ", ".join(f"{kv} {said.agreement(found):.2f}" for kv, found in alone.items()))
        if not case.wire:
            assert said == alone[case.prefill]
        if case.like is not None:
            kv, at_least = case.like
            assert said.agreement(alone[kv]) >= at_least
        await prefill.idle()
        await decode.idle()


async def test_bytes_that_cross_are_those_of_the_smaller_dtype(tiny_llama: Path) -> None:
    async with pair(tiny_llama, "fp32", "int8") as (prefill, decode):
        done = await generate(prefill, decode, request(prompts(7, (100,))[0], 2))
        transfer = done.steps[0].transfer
        assert transfer is not None
        assert transfer.bytes == 7 * decode.engine.kv.layout.block_bytes
        assert transfer.bytes < 7 * prefill.engine.kv.layout.block_bytes / 2


@pytest.mark.parametrize(("prefill", "decode"), [("fp32", "int8"), ("int8", "bf16")])
async def test_what_decode_has_stored_in_its_dtype_prefill_fetches_in_its_own(
    tiny_llama: Path, prefill: str, decode: str
) -> None:
    """The second turn of each conversation is not computed from the first, but from what the store has of it."""
    async with pair(tiny_llama, prefill, decode, blocks=(16, 24), store=True) as (first, second):
        for n, prompt in enumerate(prompts(7, LENGTHS[2:])):
            wanted = request(prompt, NEW_TOKENS, f"r{n}", ignore_eos=True)
            answered = await generate(first, second, wanted)
            assert answered.prefill.store_tokens == 0
            await second.idle()  # offloaded
            turn = request([*prompt, *answered.tokens, 7], 4, f"again{n}", ignore_eos=True)
            again = await generate(first, second, turn)
            assert again.prefill.store_tokens > 0
            assert again.prefill.cached_tokens >= (len(prompt) + NEW_TOKENS - 1) // 24 * 24 // 16 * 16
            assert again.steps[0].transfer is not None
            assert again.steps[0].transfer.conversion is not None
        await first.idle()
        await second.idle()


async def held_blocks(driver: Driver, prompt: list[int]) -> KvRegion:
    """The prompt's KV as the engine computed it, in blocks of its own."""
    _, last = await driver.run(prompt, 1, request={"hold_blocks": True})
    assert last.held is not None
    pool = driver.engine.kv.regions()
    assert isinstance(pool, KvRegion)
    data = b"".join(bytes(pool.block(int(block))) for block in last.held.block_ids)
    found = KvRegion(memoryview(bytearray(data)), pool.block_bytes, len(last.held.block_ids), pool.layer_parts)
    driver.engine.kv.free(last.held)
    return found


@pytest.mark.parametrize(("prefill", "decode"), [("fp32", "int8"), ("fp32", "int4")])
async def test_codes_are_those_of_the_engine_that_quantises(tiny_llama: Path, prefill: str, decode: str) -> None:
    """Bit for bit in the first layer, into which both have put the same numbers; nearly so in the second."""
    prompt = prompts(7, (64,))[0]
    async with running_engine(tiny_llama, **KV[prefill]) as driver:
        layout, computed = driver.engine.kv.layout, await held_blocks(driver, prompt)
    async with running_engine(tiny_llama, **KV[decode]) as driver:
        wanted, expected = driver.engine.kv.layout, await held_blocks(driver, prompt)
    found = KvRegion(
        memoryview(bytearray(len(expected.view))), expected.block_bytes, expected.num_blocks, expected.layer_parts
    )
    ids = np.arange(expected.num_blocks, dtype=np.int32)
    deviation = Transcoder(layout, wanted).move(computed, ids, found, ids, range(len(prompt)))
    assert 0 < deviation.relative_rms < 0.15
    assert list(map(bytes, found.layers(ids, 0, 1))) == list(map(bytes, expected.layers(ids, 0, 1)))
    assert bytes(found.view) != bytes(expected.view)
