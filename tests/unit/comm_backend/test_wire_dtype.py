"""Which dtype crosses: never a lossy one unasked, and by the link's speed only where that pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagellm_common.comm_backend import make_channel, wire_dtype
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.kv_dtypes import NAMES
from sagellm_common.comm_backend.transcode import row_bytes
from sagellm_common.comm_backend.wire_dtype import wire_layout
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import KvLayout

TOKENS = 1000


def a_layout(dtype: str) -> KvLayout:
    layout = KvLayout("m", dtype, 16, 30, 3, 64, 0)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * 30 * 16)


def chosen(asked: str, source: str, target: str, link_bytes_per_s: float = 0.0) -> str:
    cfg = TransportConfig(wire_dtype=asked)
    found = wire_layout(cfg, a_layout(source), a_layout(target), TOKENS, link_bytes_per_s)
    assert found == a_layout(found.dtype)
    return found.dtype


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_same_sends_the_smaller_of_the_two_dtypes_and_no_other(source: str, target: str) -> None:
    sizes = {name: a_layout(name).block_bytes for name in (source, target)}
    assert chosen("same", source, target) == (target if sizes[target] < sizes[source] else source)


@pytest.mark.parametrize(
    ("asked", "source", "target", "expected"),
    [
        ("bf16", "float32", "float32", "bfloat16"),
        ("fp16", "float32", "float32", "float16"),
        ("fp8", "bfloat16", "bfloat16", "float8_e4m3fn"),
        ("int8", "float32", "float32", "int8/float32"),
        ("int8", "bfloat16", "bfloat16", "int8/bfloat16"),
        ("int4", "float32", "int8/float32", "int4/float32"),
        ("int8", "float8_e4m3fn", "float32", "float8_e4m3fn"),
        # What is smaller already stays as it is.
        ("bf16", "float32", "int8/float32", "int8/float32"),
        ("int8", "int4/bfloat16", "float32", "int4/bfloat16"),
        ("fp16", "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_a_dtype_is_sent_where_it_is_smaller(asked: str, source: str, target: str, expected: str) -> None:
    assert chosen(asked, source, target) == expected


@pytest.mark.parametrize(
    ("link_bytes_per_s", "expected"),
    [
        (0.0, "float32"),  # unknown
        (10e6, "int8/float32"),
        (500e6, "bfloat16"),  # int8 would take longer to make than to send
        (50e9, "float32"),  # nothing is to be gained
    ],
)
def test_auto_weighs_bytes_against_what_converting_costs(
    monkeypatch: pytest.MonkeyPatch, link_bytes_per_s: float, expected: str
) -> None:
    per_head_s = {"bfloat16": 256 / 4e9, "int8/float32": 256 / 0.8e9}
    monkeypatch.setattr(wire_dtype, "seconds_per_head", lambda source, target, head_dim: per_head_s[target])
    assert chosen("auto", "float32", "float32", link_bytes_per_s) == expected


def test_auto_leaves_short_transfers_alone() -> None:
    layout = a_layout("float32")
    assert wire_layout(TransportConfig(wire_dtype="auto"), layout, layout, 1, 100e6) == layout


def test_auto_measures_what_converting_costs_here() -> None:
    seconds = wire_dtype.seconds_per_head("float32", "int8/float32", 64)
    assert 0 < seconds < 1e-3
    assert seconds == wire_dtype.seconds_per_head("float32", "int8/float32", 64)


def test_a_dtype_of_the_wire_needs_a_byte_path_that_converts() -> None:
    leases = HandoffSource(1.0, ManualClock(), lambda _: None)
    region = KvRegion(memoryview(bytearray(64)), 64, 1)

    async def pull_rpc(*_: object) -> bytes:
        raise AssertionError("nothing is pulled")

    with pytest.raises(ConfigError, match="transport.wire_dtype: 'int8' .* gloo .* set transport.backend to 'tcp'"):
        make_channel(TransportConfig(backend="gloo", wire_dtype="int8"), region, leases, "127.0.0.1", 0, pull_rpc)
    channel = make_channel(TransportConfig(backend="gloo", wire_dtype="auto"), region, leases, "127.0.0.1", 0, pull_rpc)
    assert not channel.encodes
