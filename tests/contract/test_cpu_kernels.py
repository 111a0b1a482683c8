"""The contract of the CPU kernels: compiled and plain torch ones compute the same, as exactly as promised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.native import NativeOps
from sagellm_common.engines.lmdeploy.kernels.ops import Batch, CpuOps, Decoder, DecoderLayer, DecoderShape, Planes
from sagellm_common.engines.lmdeploy.kernels.reference import ReferenceOps
from tests.support.kernels import native


@pytest.fixture(params=["torch", "avx2", "avx512_vnni"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return ReferenceOps() if request.param == "torch" else native(request.param)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- paged attention ----


@dataclass
class Case:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    q_lens: tuple[int, ...] = (1, 7, 40)
    kv_lens: tuple[int, ...] = (90, 7, 65)

    def cache(self) -> tuple[Tensor, Tensor]:
        """Blocks apart from each other, as in the pool; what nobody wrote is NaN."""
        blocks = 512
        pool = torch.full(
            (2, blocks, 3, self.block_tokens, self.kv_heads, self.head_dim), float("nan"), dtype=self.dtype
        )
        return pool[0, :, 1], pool[1, :, 1]

    def tables(self) -> Tensor:
        width = max(-(-n // self.block_tokens) for n in self.kv_lens)
        order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
        return order[: len(self.kv_lens) * width].view(len(self.kv_lens), width)


def filled(case: Case) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Batch]:
    """A cache that holds all but the new tokens, and the new tokens' query, key and value."""
    cache, tables = case.cache(), case.tables()
    new_keys, new_values = [], []
    for s, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        both = [random(kv_len, case.kv_heads, case.head_dim, seed=10 * s + i) for i in range(2)]
        position = torch.arange(kv_len - q_len)
        for part, data in zip(cache, both, strict=True):
            part[tables[s, position // case.block_tokens], position % case.block_tokens] = data[: kv_len - q_len].to(
                case.dtype
            )
        new_keys.append(both[0][kv_len - q_len :])
        new_values.append(both[1][kv_len - q_len :])
    query = random(sum(case.q_lens), case.heads, case.head_dim, seed=99)
    batch = Batch.of(torch.tensor(case.q_lens), torch.tensor(case.kv_lens), tables)
    return cache, query, torch.cat(new_keys), torch.cat(new_values), batch


def exact_attention(case: Case, cache: tuple[Tensor, Tensor], query: Tensor, batch: Batch, scale: float) -> Tensor:
    """Softmax over what each token may see, in float64, from the cache as it is now."""
    rows = []
    for s, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        position = torch.arange(kv_len)
        where = batch.tables[s, position // case.block_tokens], position % case.block_tokens
        keys, values = (part[where].double().repeat_interleave(case.heads // case.kv_heads, 1) for part in cache)
        start = int(batch.q_starts[s])
        scores = torch.einsum("qhd,khd->hqk", query[start : start + q_len].double(), keys) * scale
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(rows)


CASES = [
    Case(),
    Case(heads=4, kv_heads=4, head_dim=16, block_tokens=1),
    Case(heads=9, kv_heads=3, block_tokens=7),
    Case(heads=14, kv_heads=2, head_dim=32, q_lens=(16, 1), kv_lens=(16, 1)),
    Case(heads=20, kv_heads=1, head_dim=80, q_lens=(3,), kv_lens=(200,)),
    Case(heads=2, kv_heads=2, head_dim=96, dtype=torch.float16),
    Case(heads=2, kv_heads=1, head_dim=128, dtype=torch.bfloat16),
    Case(heads=1, kv_heads=1, head_dim=256),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_attention_equals_float64_and_writes_what_it_is_given(ops: CpuOps, case: Case) -> None:
    cache, query, key, value, batch = filled(case)
    scale = 0.37
    found = ops.paged_attention(query, key, value, cache, batch, scale)
    expected = exact_attention(case, cache, query, batch, scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    position = torch.arange(case.kv_lens[-1] - case.q_lens[-1], case.kv_lens[-1])
    where = batch.tables[-1, position // case.block_tokens], position % case.block_tokens
    for part, new in zip(cache, (key, value), strict=True):
        assert torch.equal(part[where], new[-case.q_lens[-1] :].to(case.dtype))
    again = ops.paged_attention(query, None, None, cache, batch, scale)
    assert torch.equal(found, again)


def test_attention_of_a_row_has_the_same_bits_in_any_company(ops: CpuOps) -> None:
    case = Case(heads=9, kv_heads=3, q_lens=(20, 1, 9), kv_lens=(60, 41, 9))
    cache, query, key, value, batch = filled(case)
    together = ops.paged_attention(query, key, value, cache, batch, 0.1)
    with threads(2):
        assert torch.equal(ops.paged_attention(query, None, None, cache, batch, 0.1), together)
    start = 0
    for s, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        for cut in {1, q_len // 2, q_len} - {0}:
            for first in range(0, q_len, cut):
                count = min(cut, q_len - first)
                rows = slice(start + first, start + first + count)
                one = Batch.of(
                    torch.tensor([count]), torch.tensor([kv_len - q_len + first + count]), batch.tables[s : s + 1]
                )
                assert torch.equal(ops.paged_attention(query[rows], None, None, cache, one, 0.1), together[rows])
        start += q_len


# ---- quantised linear layers ----


def from_nibbles(rows: int, columns: int) -> Tensor:
    """Weights as a 4-bit file gives them: a float16 step and minimum per 32."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows, columns // 32, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    step = (0.01 + torch.rand(rows, columns // 32, 1, generator=generator) / 50).half().float()
    return (codes * step - (step * 7.3).half().float()).flatten(1)


def from_bytes(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (rows, columns // 32, 32), generator=generator).float()
    codes[..., 0] = 127
    return (codes * (0.001 + torch.rand(rows, columns // 32, 1, generator=generator) / 500).half().float()).flatten(1)


WEIGHTS = {4: from_nibbles, 8: from_bytes, 16: lambda rows, columns: random(rows, columns, seed=5) / columns**0.5}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_is_as_exact_as_its_planes_allow(ops: CpuOps, bits: int, planes: Planes) -> None:
    weight, bias, x = WEIGHTS[bits](72, 160), random(72, seed=6), random(37, 160, seed=7)
    layer = ops.linear(weight, bias, planes)
    assert layer.bits == (8 if (bits, planes) == (16, 1) else bits)
    assert layer.size_bytes > 0
    exact = x.double() @ weight.double().T + bias.double()
    # Each of two factors errs by at most half a step of 127 (times 256) in its group's largest value, at random.
    error = (layer(x).double() - exact).norm() / exact.norm()
    assert error < (1e-2 if planes == 1 else 3e-5)
    if bits != 16:
        weight_exact = ops.linear(weight, None, planes)
        whole = torch.zeros(1, 160)
        whole[0, 5] = 3.0
        torch.testing.assert_close(weight_exact(whole)[0], 3.0 * weight[:, 5], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_of_a_row_has_the_same_bits_in_any_company(ops: CpuOps, bits: int) -> None:
    weight, x = WEIGHTS[bits](40, 96), random(19, 96, seed=8)
    layer = ops.linear(weight, None, 2)
    together = layer(x)
    with threads(2):
        assert torch.equal(layer(x), together)
    for a, b in itertools.pairwise((0, 1, 3, 8, 19)):
        assert torch.equal(layer(x[a:b]), together[a:b])


def test_rows_and_groups_of_zeros_and_outliers_stay_finite(ops: CpuOps) -> None:
    weight, x = random(16, 64, seed=9), random(3, 64, seed=10)
    weight[3], x[1], x[2, 7] = 0, 0, 1e6
    for planes in (1, 2):
        y = ops.linear(weight, None, planes)(x)
        assert y.isfinite().all()
        assert (y[:, 3] == 0).all()
        assert (y[1] == 0).all()


# ---- the decoder ----

SHAPE = DecoderShape(hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, norm_eps=1e-6, planes=2)
LAYERS, POSITIONS, BLOCK_TOKENS = 2, 256, 16
LENGTHS = (37, 1, 18, 16)


def decoder(ops: CpuOps, shape: DecoderShape) -> Decoder:
    def weight(rows: int, columns: int, seed: int) -> Tensor:
        return random(rows, columns, seed=seed) / columns**0.5

    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layers = [
        DecoderLayer(
            attention_norm=1 + random(shape.hidden, seed=20 + i) / 10,
            qkv=ops.linear(weight(width, shape.hidden, 30 + i), random(width, seed=40 + i) / 10, shape.planes),
            output=ops.linear(weight(shape.hidden, shape.heads * shape.head_dim, 50 + i), None, shape.planes),
            mlp_norm=1 + random(shape.hidden, seed=60 + i) / 10,
            gate_up=ops.linear(weight(2 * shape.intermediate, shape.hidden, 70 + i), None, shape.planes),
            down=ops.linear(weight(shape.hidden, shape.intermediate, 80 + i), None, shape.planes),
        )
        for i in range(LAYERS)
    ]
    angles = torch.arange(POSITIONS)[:, None] / 10000.0 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    return ops.decoder(shape, layers, torch.ones(shape.hidden), angles.cos().contiguous(), angles.sin().contiguous())


def caches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    pool = torch.zeros(32, 2, LAYERS, BLOCK_TOKENS, SHAPE.kv_heads, SHAPE.head_dim, dtype=dtype)
    return [(pool[:, 0, i], pool[:, 1, i]) for i in range(LAYERS)]


def embeddings() -> list[Tensor]:
    return [random(n, SHAPE.hidden, seed=100 + i) for i, n in enumerate(LENGTHS)]


TABLES = torch.randperm(32, generator=torch.Generator().manual_seed(2))[:20].view(4, 5)


def one_by_one(run: Decoder, kv: list[tuple[Tensor, Tensor]], chunk: int) -> list[Tensor]:
    """Each sequence alone, in chunks; the hidden states of all its tokens."""
    found = []
    for s, x in enumerate(embeddings()):
        parts = []
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk].clone()
            batch = Batch.of(torch.tensor([len(part)]), torch.tensor([start + len(part)]), TABLES[s : s + 1])
            parts.append(run(part, kv, batch))
        found.append(torch.cat(parts))
    return found


@pytest.mark.parametrize(("planes", "dtype"), [(1, torch.float16), (2, torch.float32)])
def test_blocks_have_the_same_bytes_for_any_chunks_batch_and_threads(
    ops: CpuOps, planes: Planes, dtype: torch.dtype
) -> None:
    run = decoder(ops, replace(SHAPE, planes=planes))
    expected_kv = caches(dtype)
    expected = one_by_one(run, expected_kv, chunk=1000)
    assert float(expected_kv[1][0].float().abs().sum()) > 0
    for chunk in (10, 16):
        kv = caches(dtype)
        assert all(map(torch.equal, one_by_one(run, kv, chunk), expected))
        assert all(torch.equal(a, b) for x, y in zip(kv, expected_kv, strict=True) for a, b in zip(x, y, strict=True))
    for count in (1, 2):
        kv = caches(dtype)
        lengths = torch.tensor(LENGTHS)
        with threads(count):
            together = run(torch.cat(embeddings()), kv, Batch.of(lengths, lengths, TABLES))
        assert torch.equal(together, torch.cat(expected))
        assert all(torch.equal(a, b) for x, y in zip(kv, expected_kv, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_each_layer_is_told_once_its_kv_is_complete(ops: CpuOps, count: int) -> None:
    """As it stays, and no later layer's with it."""
    kv, lengths, told = caches(), torch.tensor(LENGTHS), []

    def layer_done(layer: int) -> None:
        told.append((layer, [torch.stack(part).clone() for part in kv]))

    with threads(count):
        decoder(ops, SHAPE)(torch.cat(embeddings()), kv, Batch.of(lengths, lengths, TABLES), layer_done)
    assert [layer for layer, _ in told] == list(range(LAYERS))
    for layer, seen in told:
        for i, (then, now) in enumerate(zip(seen, kv, strict=True)):
            assert torch.equal(then, torch.stack(now) if i <= layer else torch.zeros_like(then))


@pytest.mark.parametrize("planes", [1, 2])
def test_compiled_and_plain_decoders_agree(planes: Planes) -> None:
    """Not to the bit: their attention adds in float32 and float64. The instruction sets agree to the bit."""
    shape, lengths = replace(SHAPE, planes=planes), torch.tensor(LENGTHS)
    results = []
    for ops in (ReferenceOps(), *map(native, ("avx2", "avx512_vnni"))):
        kv = caches()
        hidden = decoder(ops, shape)(torch.cat(embeddings()), kv, Batch.of(lengths, lengths, TABLES))
        results.append((hidden, *(part for layer in kv for part in layer)))
    reference, avx2, avx512 = results
    assert all(map(torch.equal, avx2, avx512))
    for a, b in zip(reference, avx2, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2 if planes == 1 else 2e-4)


def test_a_library_that_was_not_built_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("SAGELLM_CACHE", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(OSError, match="avx2"):
        NativeOps("avx2")
