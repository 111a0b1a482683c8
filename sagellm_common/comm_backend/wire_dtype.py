"""In which dtype KV crosses a link: what `transport.wire_dtype` asks for, and by the link's speed where it says auto.

Free of loss is the source's dtype, and the receiver's: whichever side converts, the same bits arrive, so the smaller of
the two is sent. Anything smaller than that loses something, and is sent only if the configuration says so.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from sagellm_common.comm_backend.kv_dtypes import FLOAT_BYTES, KvDtype, parse
from sagellm_common.comm_backend.transcode import row_bytes, with_dtype
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.types import KvLayout

CODES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn", "int8": "int8", "int4": "int4"}

WIRE_DTYPES = ("same", *CODES)
"""What a plan may say."""
AUTO = ("bf16", "int8")
"""What auto may choose, the more exact first. int4 costs more accuracy than anybody should get unasked."""
WORTH_IT = 1.3
"""auto takes the less exact of two only where it is this many times as fast."""
WORTH_IT_S = 1e-3
"""and only for transfers that take longer than this."""


def wire_layout(
    cfg: TransportConfig, source: KvLayout, target: KvLayout, num_tokens: int, link_bytes_per_s: float
) -> KvLayout:
    """The source's layout in the dtype it is to send `num_tokens` in; `link_bytes_per_s` 0: not known."""
    name: str = cfg.wire_dtype
    if name == "auto":
        name = auto_dtype(source, target, num_tokens, link_bytes_per_s)
    exact = _free_of_loss(source, target)
    if name == "same" or not row_bytes(exact):
        return exact
    asked = with_wire_dtype(name, source)
    return asked if sum(row_bytes(asked)) < sum(row_bytes(exact)) else exact


def auto_dtype(source: KvLayout, target: KvLayout, num_tokens: int, link_bytes_per_s: float) -> str:
    """What `auto` comes to: `same`, or one of AUTO."""
    best_name, best = "same", _free_of_loss(source, target)
    if not link_bytes_per_s or not row_bytes(best):
        return best_name
    best_s = _seconds(source, best, num_tokens, link_bytes_per_s)
    for name in AUTO:
        other = with_wire_dtype(name, source)
        if best_s < WORTH_IT_S or sum(row_bytes(other)) >= sum(row_bytes(best)):
            continue
        other_s = _seconds(source, other, num_tokens, link_bytes_per_s)
        if other_s * WORTH_IT <= best_s:
            best_name, best, best_s = name, other, other_s
    return best_name


def _free_of_loss(source: KvLayout, target: KvLayout) -> KvLayout:
    theirs, mine = parse(source.dtype), parse(target.dtype)
    if theirs is None or mine is None:
        return source
    received = with_dtype(source, mine)
    return received if sum(row_bytes(received)) < sum(row_bytes(source)) else source


def with_wire_dtype(name: str, layout: KvLayout) -> KvLayout:
    """With scales, if it has any, in the dtype that an engine with such KV would keep them in."""
    dtype, codes = parse(layout.dtype), CODES[name]
    assert dtype is not None
    if codes in FLOAT_BYTES:
        return with_dtype(layout, KvDtype(codes))
    scales = dtype.scales or (dtype.codes if dtype.codes != "float8_e4m3fn" else "float32")
    return with_dtype(layout, KvDtype(codes, scales))


def _seconds(source: KvLayout, wire: KvLayout, num_tokens: int, link_bytes_per_s: float) -> float:
    """Converting and sending go on at the same time: the slower of them counts."""
    heads = num_tokens * source.num_layers * source.num_kv_heads * 2
    converting_s = (
        0.0 if wire.dtype == source.dtype else heads * seconds_per_head(source.dtype, wire.dtype, source.head_dim)
    )
    return max(converting_s, sum(row_bytes(wire)) * source.num_layers * num_tokens / link_bytes_per_s)


@cache
def seconds_per_head(source: str, target: str, head_dim: int) -> float:
    """What converting one head of one token costs on this machine, its deviation included: measured, in a millisecond
    or two, when it is first asked for."""
    from sagellm_common.comm_backend.kv_dtypes import Deviation

    theirs, mine = parse(source), parse(target)
    assert theirs is not None and mine is not None
    heads = max(1, (64 << 10) // head_dim)
    numbers = np.random.default_rng(0).standard_normal((heads, head_dim), np.float32)
    codes, scales = (None if part is None else part.ravel() for part in theirs.encode(numbers))
    best_s = float("inf")
    for _ in range(3):
        began_s = time.perf_counter()
        decoded = theirs.decode(codes, scales, head_dim)  # type: ignore[arg-type]
        made = mine.encode(decoded)
        Deviation().observe(
            decoded, mine.decode(made[0].ravel(), None if made[1] is None else made[1].ravel(), head_dim)
        )
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s / heads
