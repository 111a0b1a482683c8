"""Everything survives the wire, and nothing malformed gets in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    GenerationSummary,
    HandoffTicket,
    KvConversion,
    KvHealth,
    KvOrigins,
    KvSource,
    KvStats,
    SamplingParams,
    TenantUsage,
    TokenLogprob,
    WorkerRole,
    WorkerState,
    as_token_ids,
)
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.prefix_reuse.sharding import Extent
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, inference_pb2, kv_pb2
from tests.support.topology import LAYOUT, MODEL, make_record

SOURCE = KvSource(
    transfer_id="r1",
    epoch=2,
    worker_id="prefill-0",
    incarnation="i1",
    control_address="h:1",
    data_address="h:2",
    backend="tcp",
    block_table=as_token_ids([7, 0, 3]),
    num_tokens=40,
    lease_expires_in_ms=30_000,
    layers_ready=2,
    tokens_ready=40,
    disk_blocks=2,
)
TICKET = HandoffTicket("r1", 2, "decode-0", "i2", as_token_ids([1, 2]), 16, 30_000)
SAMPLING = SamplingParams(
    max_new_tokens=9,
    temperature=0.5,
    top_p=0.25,
    top_k=4,
    min_p=0.125,
    repetition_penalty=1.5,
    seed=2**64 - 1,
    min_new_tokens=2,
    ignore_eos=True,
    stop_token_ids=(1, 5),
    num_logprobs=3,
)
# Each field its own value, so that two swapped ones are noticed.
SUMMARY = GenerationSummary(
    **{
        f.name: f"s{i}" if f.type == "str" else (i + 0.5 if f.type == "float" else i)
        for i, f in enumerate(dataclasses.fields(GenerationSummary), start=1)
        if not f.name.endswith("_conversion") and f.name != "origins"
    },
    origins=KvOrigins(101, 102, 103),
    kv_conversion=KvConversion("int8/float32", 0.5, 0.25, 3),
    store_conversion=KvConversion("int4/float32", 1.5, 0.75, 0),
)
LOGPROBS = (TokenLogprob(-0.5, (3, 4), (-0.5, -1.5)), TokenLogprob(-0.25))

RECORDS = [
    make_record(role=role, state=state, model=model)
    for role in WorkerRole
    for state in WorkerState
    for model in (MODEL, None)
]


def same(a: Any, b: Any) -> bool:
    """Equality of dataclasses that may hold arrays."""
    left, right = dataclasses.asdict(a), dataclasses.asdict(b)
    return type(a) is type(b) and all(np.array_equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("encode", "decode", "value"),
    [
        (codec.encode_layout, codec.decode_layout, LAYOUT),
        (codec.encode_model_info, codec.decode_model_info, MODEL),
        *[(codec.encode_worker_record, codec.decode_worker_record, record) for record in RECORDS],
        (codec.encode_kv_stats, codec.decode_kv_stats, KvStats(10, 5, 3, 2)),
        (codec.encode_kv_source, codec.decode_kv_source, SOURCE),
        (codec.encode_ticket, codec.decode_ticket, TICKET),
        (codec.encode_sampling, codec.decode_sampling, SAMPLING),
        (codec.encode_sampling, codec.decode_sampling, SamplingParams(max_new_tokens=1)),
        (codec.encode_sampling, codec.decode_sampling, SamplingParams(max_new_tokens=1, seed=0)),
        (codec.encode_summary, codec.decode_summary, SUMMARY),
        (codec.encode_summary, codec.decode_summary, dataclasses.replace(SUMMARY, kv_conversion=None)),
    ],
)
def test_values_survive_the_wire(encode: Callable[[Any], Any], decode: Callable[[Any], Any], value: Any) -> None:
    message = encode(value)
    received = type(message).FromString(message.SerializeToString())
    assert same(decode(received), value)


def test_a_request_survives_and_takes_its_trace_from_outside() -> None:
    request = GenerationRequest("r1", "tiny", as_token_ids([1, 2, 3]), SAMPLING, "t", -4, "salt", {"traceparent": "x"})
    received = codec.decode_generation_request(codec.encode_generation_request(request), {"traceparent": "x"})
    assert same(received, request)


def test_an_unset_tenant_is_the_default_one() -> None:
    assert codec.decode_generation_request(inference_pb2.GenerateRequest()).tenant == "default"


@pytest.mark.parametrize(
    "output",
    [
        GenerationOutput("r1", 3, (5, 6), LOGPROBS),
        *[GenerationOutput("r1", 0, (), (), reason, SUMMARY) for reason in FinishReason],
    ],
)
def test_an_output_survives(output: GenerationOutput) -> None:
    assert codec.decode_output(codec.encode_output(output)) == output


def test_unset_sampling_values_that_make_no_sense_are_the_defaults() -> None:
    sampling = codec.decode_sampling(common_pb2.SamplingParams(max_new_tokens=5))
    assert sampling == SamplingParams(max_new_tokens=5)


def test_a_nan_passes_for_validation_to_name_it() -> None:
    sampling = codec.decode_sampling(common_pb2.SamplingParams(temperature=float("nan")))
    assert np.isnan(sampling.temperature)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_are_little_endian_int32(tokens: list[int]) -> None:
    packed = b"".join(t.to_bytes(4, "little", signed=True) for t in tokens)
    assert codec.decode_token_ids(packed).tolist() == tokens


@given(st.binary().filter(lambda b: len(b) % 4))
def test_broken_token_ids_are_refused(packed: bytes) -> None:
    with pytest.raises(InvalidRequest, match=rf"^prompt has {len(packed)} bytes"):
        codec.decode_token_ids(packed, "prompt")


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes(hashes: list[bytes]) -> None:
    assert codec.decode_hashes(codec.encode_hashes(hashes)) == hashes


@pytest.mark.parametrize("length", [1, 15, 17])
def test_broken_hashes_are_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"block_hashes has {length} bytes"):
        codec.decode_hashes(bytes(length))


def broken(encode: Callable[[Any], Any], value: Any, **changes: Any) -> Any:
    message = encode(value)
    for name, new in changes.items():
        setattr(message, name, new)
    return message


@pytest.mark.parametrize(
    ("decode", "message", "field"),
    [
        *[
            (codec.decode_layout, broken(codec.encode_layout, LAYOUT, **{name: value}), f"layout.{name}")
            for name, value in [
                ("model_fingerprint", ""),
                ("dtype", ""),
                ("block_size_tokens", 0),
                ("num_layers", -1),
                ("num_kv_heads", 0),
                ("head_dim", 0),
                ("block_bytes", 0),
                ("tp", 0),
                ("pp", 0),
            ]
        ],
        *[
            (codec.decode_worker_record, broken(codec.encode_worker_record, make_record(), **{n: v}), f"record.{n}")
            for n, v in [
                ("worker_id", ""),
                ("address", ""),
                ("incarnation", ""),
                ("role", 0),
                ("role", 99),
                ("state", 0),
                ("pid", -1),
            ]
        ],
        *[
            (codec.decode_kv_source, broken(codec.encode_kv_source, SOURCE, **{name: value}), f"source.{name}")
            for name, value in [
                ("transfer_id", ""),
                ("epoch", -1),
                ("worker_id", ""),
                ("incarnation", ""),
                ("control_address", ""),
                ("data_address", ""),
                ("backend", ""),
                ("num_tokens", -1),
                ("block_table", b"123"),
                ("block_table", b"\xff\xff\xff\xff"),
            ]
        ],
        *[
            (codec.decode_ticket, broken(codec.encode_ticket, TICKET, **{name: value}), f"ticket.{name}")
            for name, value in [
                ("transfer_id", ""),
                ("worker_id", ""),
                ("block_table", b"1"),
                ("num_cached_tokens", -1),
            ]
        ],
        (codec.decode_kv_stats, common_pb2.KvStats(free_blocks=-1), "kv.free_blocks"),
        (codec.decode_finish_reason, 99, "finish_reason"),
        (codec.decode_output, inference_pb2.GenerateResponse(index=-1), "index"),
        (codec.decode_logprobs, [common_pb2.TokenLogprobs(top_token_ids=[1])], "logprobs"),
        (codec.decode_generation_request, inference_pb2.GenerateRequest(prompt_token_ids=b"1"), "prompt_token_ids"),
    ],
)
def test_a_malformed_field_is_named(decode: Callable[[Any], Any], message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field} "):
        decode(message)


def test_contexts_are_of_all_blocks_or_none() -> None:
    known = [b"12345678", b"abcdefgh"]
    assert codec.decode_contexts(codec.encode_contexts(known), 2) == known
    assert codec.decode_contexts(codec.encode_contexts([b"12345678", b""]), 2) == []
    with pytest.raises(InvalidRequest, match="contexts has 16 bytes, but must have 8 for each of 3 blocks, or none"):
        codec.decode_contexts(codec.encode_contexts(known), 3)


def test_extents_are_checked() -> None:
    key = b"k" * 16
    sent = [Extent(key, 64, 96), Extent(key, 101, 103)]
    messages = [codec.encode_extent(extent) for extent in sent]
    assert codec.decode_extents(messages, 34) == sent
    for message in messages:  # as of a sender that does not tell
        message.sequence_block = 0
    assert codec.decode_extents(messages, 34) == [Extent(key, 0, 32), Extent(key, 5, 7)]
    messages[0].sequence_block = 33
    with pytest.raises(InvalidRequest, match="sequence_block 33"):
        codec.decode_extents(messages, 34)
    messages[0].sequence_block = 0
    assert codec.decode_extents([], 7) == []
    with pytest.raises(InvalidRequest, match="extents has 34 blocks, but block_hashes has 33"):
        codec.decode_extents(messages, 33)


@pytest.mark.parametrize(
    ("key", "first", "num"), [(b"k", 0, 1), (b"k" * 16, -1, 2), (b"k" * 16, 0, 0), (b"k" * 16, 20, 13)]
)
def test_an_extent_that_is_none_is_refused(key: bytes, first: int, num: int) -> None:
    with pytest.raises(InvalidRequest, match="an extent has 32 blocks and a key of 16 bytes"):
        codec.decode_extents([kv_pb2.KvExtent(key=key, first_block=first, num_blocks=num)], num)


def test_what_a_worker_finds_of_its_pool_survives() -> None:
    health = KvHealth(5, 2, ("a block is free twice",), 7, 1, 0.25, 0.5, 9, (TenantUsage("acme", 6, 2, 4, 8, 3),))
    assert codec.decode_kv_health(codec.encode_kv_health(health)) == health
    assert codec.decode_kv_health(codec.encode_kv_health(KvHealth())) == KvHealth()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_what_computing_costs_is_checked(wrong: float) -> None:
    cost = RecomputeCost(1e-4, 2e-8)
    assert codec.decode_recompute_cost(codec.encode_recompute_cost(cost)) == cost
    for field in ("token_s", "attention_s"):
        message = codec.encode_recompute_cost(replace(cost, **{field: wrong}))
        with pytest.raises(InvalidRequest, match=rf"recompute_cost\.{field} is"):
            codec.decode_recompute_cost(message)
