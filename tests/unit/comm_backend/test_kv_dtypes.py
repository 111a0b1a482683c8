"""Each dtype against torch's own, and the quantiser against the engine's, at the edges of what numbers there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sagellm_common.comm_backend.kv_dtypes import Deviation, KvDtype, parse
from sagellm_common.engines.lmdeploy.device_cpu.attention import dequantize, quantize

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}
WORDS = {"bfloat16": np.uint16, "float16": np.uint16, "float8_e4m3fn": np.uint8}


def a_dtype(name: str) -> KvDtype:
    found = parse(name)
    assert found is not None
    return found


def all_magnitudes() -> np.ndarray:
    """float32 of every exponent, ties between any two neighbours of the narrower dtypes, denormals, inf and NaN."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    rng = np.random.default_rng(0)
    bits = np.concatenate([high, high | 0x8000, high | 0x7FFF, high | rng.integers(0, 1 << 16, 1 << 16, np.uint32)])
    steps = (np.arange(1 << 12) / 2.0**11).astype(np.float32)  # ties of subnormal float8_e4m3fn
    return np.concatenate([bits.view(np.float32), steps, -steps])


@pytest.mark.parametrize("name", TORCH)
def test_numbers_are_rounded_as_torch_rounds_them(name: str) -> None:
    numbers = all_magnitudes()
    saturated = torch.from_numpy(numbers)
    if name == "float8_e4m3fn":
        saturated = saturated.clamp(-448, 448)
    expected = saturated.to(TORCH[name])
    found, scales = a_dtype(name).encode(numbers[:, None])
    assert scales is None
    nan = np.isnan(numbers)
    words = expected.view(torch.uint8).numpy().view(WORDS[name])
    assert np.array_equal(found.view(WORDS[name]).ravel()[~nan], words.ravel()[~nan])
    decoded = a_dtype(name).decode(found.ravel(), None, 1).ravel()
    assert np.isnan(decoded[nan]).all()
    assert np.array_equal(decoded[~nan].view(np.uint32), expected.float().numpy()[~nan].view(np.uint32))


@pytest.mark.parametrize("name", TORCH)
def test_every_code_says_what_torch_says(name: str) -> None:
    words = np.arange(1 << 8 * WORDS[name]().itemsize, dtype=np.uint32).astype(WORDS[name])
    expected = torch.from_numpy(words.view(np.uint8)).view(TORCH[name]).float().numpy()
    assert np.array_equal(a_dtype(name).decode(words.view(np.uint8), None, 1).ravel(), expected, equal_nan=True)


def test_float8_saturates_and_says_by_how_much() -> None:
    numbers = np.array([[448.0, 463.9, 1e6, -np.inf]], np.float32)
    dtype, deviation = a_dtype("float8_e4m3fn"), Deviation()
    decoded = dtype.decode(dtype.encode(numbers)[0].ravel(), None, 4)
    assert decoded.tolist() == [[448.0, 448.0, 448.0, -448.0]]
    deviation.observe(numbers, decoded.copy())
    assert deviation.max_abs == pytest.approx(1e6 - 448)
    assert deviation.non_finite == 1


EDGES = {
    "zeros": np.zeros(8),
    "constant": np.full(8, 3.25),
    "constant negative": np.full(8, -1e4),
    "one apart": np.array([0.0] * 7 + [1.0]),
    "denormal": np.linspace(0, 1e-40, 8),
    "all but constant": 5 + np.linspace(0, 1e-7, 8),
    "large": np.linspace(-3e38, 3e4, 8),
    "its range is beyond float32": np.linspace(-3e38, 3e38, 8),
    "ties": np.arange(8) / 14,
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.filterwarnings("ignore:invalid value")  # torch makes integers of NaN, whatever that is
def test_codes_are_the_engines_to_the_bit(bits: int, scales: str, edge: str) -> None:
    numbers = np.stack([EDGES[edge], EDGES[edge][::-1]]).astype(np.float32)
    dtype = a_dtype(f"int{bits}/{scales}")
    codes, made = dtype.encode(numbers)
    assert made is not None
    expected, scales_zeros = quantize(torch.from_numpy(numbers), bits)
    kept = scales_zeros.to(getattr(torch, scales))
    assert made.tobytes() == kept.view(torch.uint8).numpy().tobytes()
    if np.isfinite(scales_zeros.numpy()).all():
        assert codes.tobytes() == expected.numpy().tobytes()
        read = dequantize(expected, kept, bits, torch.float32).numpy()
        assert np.array_equal(dtype.decode(codes, made.ravel(), 8), read, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int8/float32", "int4/float16"])
def test_a_head_with_inf_or_nan_stays_no_number_and_is_counted(name: str, bad: float) -> None:
    numbers = np.ones((3, 8), np.float32) * np.arange(8, dtype=np.float32)
    numbers[1, 2] = bad
    dtype, deviation = a_dtype(name), Deviation()
    codes, scales = dtype.encode(numbers)
    assert scales is not None
    decoded = dtype.decode(codes, scales.ravel(), 8)
    assert not np.isfinite(decoded[1]).any()
    assert np.isfinite(decoded[[0, 2]]).all()
    deviation.observe(numbers, decoded.copy())
    assert deviation.non_finite == 8
    assert 0 < deviation.relative_rms < 0.05


def test_the_deviation_is_that_of_all_numbers() -> None:
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal((5, 64), np.float32)
    dtype, whole, parts = a_dtype("int8/float32"), Deviation(), Deviation()
    decoded = dtype.decode(*(part.ravel() for part in dtype.encode(numbers)), 64)  # type: ignore[union-attr]
    whole.observe(numbers, decoded.copy())
    for row in range(5):
        part = Deviation()
        part.observe(numbers[row : row + 1], decoded[row : row + 1].copy())
        parts.add(part)
    differences = (decoded - numbers).astype(np.float64)
    assert whole.max_abs == parts.max_abs == np.abs(differences).max()
    expected = np.sqrt((differences**2).sum() / (numbers.astype(np.float64) ** 2).sum())
    assert whole.relative_rms == pytest.approx(expected, rel=1e-5)
    assert parts.relative_rms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8/float32"])
@pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8/float32", "int4/float16"])
def test_what_holds_another_loses_nothing_of_it(wide: str, narrow: str) -> None:
    """And what does not hold it does lose something, of some number."""
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((64, 8)).astype(np.float32) * 10.0 ** rng.integers(-6, 7, (64, 1))
    numbers[:8] = np.float32(2.0) ** -np.arange(64).reshape(8, 8)
    source, target = a_dtype(narrow), a_dtype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        codes, scales = source.encode(numbers.astype(np.float32))
        kept = source.decode(codes.ravel(), None if scales is None else scales.ravel(), 8)
        kept = kept[np.isfinite(kept).all(-1)]
        codes, scales = target.encode(kept)
        again = target.decode(codes.ravel(), None if scales is None else scales.ravel(), 8)
    if target.holds(source):
        assert source == target or np.array_equal(again, kept)
    else:
        assert not np.array_equal(again, kept)


@pytest.mark.parametrize("name", ["", "float64", "int8", "int8/", "int8/int8", "float32/float32", "float32@ascend"])
def test_other_dtypes_are_not_known(name: str) -> None:
    assert parse(name) is None
