"""KV dtypes: what the bytes of a token's heads say, and which bytes an engine would have kept of the same numbers.

    float32 bfloat16 float16    the numbers
    float8_e4m3fn               1 sign, 4 exponent, 3 fraction bits, no infinities; beyond ±448 it saturates
    int8/SCALE  int4/SCALE      codes of each head, and beside them its scale and zero point, both in the dtype SCALE:
                                number = (code - zero) * scale; of int4 the first half of a head is in the low nibbles

Numbers are rounded to the nearest, ties to even. Codes are LMDeploy's, operation by operation in float32
(kernels/cuda/fill_kv_cache.py, and `quantize` of our CPU attention): a head transcoded to them is to the bit what an
engine that quantises would have kept. So is what comes of heads with inf or NaN: their scale is no number, and neither
is what is read of them. Nothing is hidden by clamping; `Deviation` counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_CODE_BITS = {"int8": 8, "int4": 4}
_SCALES = ("float32", "bfloat16", "float16")
_SMALLEST_RANGE = np.float32(1e-8)
"""Of a head whose numbers are all equal: its scale must not be 0."""

_FP8_LARGEST = 0x7E  # 448; 0x7F is NaN
_FP8_LEAST_NORMAL_BITS = np.uint32(0x3C80_0000)  # 2**-6 as float32
_FP8_SUBNORMAL = np.float32(2.0**14)
"""float32 numbers from here to twice as much are 2**-9 apart, as subnormal float8_e4m3fn are: adding it rounds."""


@dataclass(frozen=True, slots=True)
class KvDtype:
    """`codes` is a key of FLOAT_BYTES, or int8 or int4; `scales` a key of FLOAT_BYTES with them and empty else."""

    codes: str
    scales: str = ""

    @property
    def name(self) -> str:
        return f"{self.codes}/{self.scales}" if self.scales else self.codes

    @property
    def bits(self) -> int:
        """Of a code; 0 for numbers that are kept as they are."""
        return _CODE_BITS.get(self.codes, 0)

    def head_bytes(self, head_dim: int) -> tuple[int, ...]:
        """What one head of one token takes: of numbers or codes, and of its scale and zero point if there are any."""
        if not self.scales:
            return (head_dim * FLOAT_BYTES[self.codes],)
        return head_dim * self.bits // 8, 2 * FLOAT_BYTES[self.scales]

    def decode(self, codes: Bytes, scales: Bytes | None, head_dim: int) -> Float32:
        """Bytes of any number of heads → [heads, head_dim]."""
        if scales is None:
            return _decode_floats(self.codes, codes).reshape(-1, head_dim)
        scale, zero = _decode_floats(self.scales, scales).reshape(-1, 2).T
        numbers = _unpacked(codes.reshape(-1, head_dim * self.bits // 8), self.bits).astype(np.float32)
        with np.errstate(all="ignore"):
            numbers -= zero[:, None]
            numbers *= scale[:, None]
        return numbers

    def encode(self, numbers: Float32) -> tuple[Bytes, Bytes | None]:
        """[heads, head_dim] → the bytes of numbers or codes, and of scales and zero points or None."""
        if not self.scales:
            return _encode_floats(self.codes, numbers), None
        codes, scales = _quantized(numbers, self.bits)
        return codes, _encode_floats(self.scales, scales)

    def holds(self, other: KvDtype) -> bool:
        """Whether each number that `other` can stand for is kept as it is. What codes stand for is a float32."""
        if self == other or self.codes == "float32":
            return True
        return other.codes == "float8_e4m3fn" and self.codes in ("bfloat16", "float16")


NAMES = (*FLOAT_BYTES, *(f"{codes}/{scales}" for codes in _CODE_BITS for scales in _SCALES))
"""All that are known, in an order that stays: byte paths send the place in it."""


@cache
def parse(name: str) -> KvDtype | None:
    """None for a dtype that is not known here, and so moves only as it is."""
    codes, slash, scales = name.partition("/")
    if codes in FLOAT_BYTES and not slash:
        return KvDtype(codes)
    if codes in _CODE_BITS and scales in _SCALES:
        return KvDtype(codes, scales)
    return None


@dataclass(slots=True)
class Deviation:
    """By how much numbers differ from what they were. Where one of two numbers is inf or NaN it counts in
    `non_finite`, and nowhere else."""

    max_abs: float = 0.0
    squares: float = 0.0
    """Of the differences; and of the numbers."""
    number_squares: float = 0.0
    non_finite: int = 0

    @property
    def relative_rms(self) -> float:
        """√(Σ difference² / Σ number²); inf where the numbers were all 0 and are not."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.number_squares) if self.number_squares else math.inf

    def observe(self, before: Float32, after: Float32) -> None:
        """Takes `after` for its own use."""
        with np.errstate(all="ignore"):
            np.subtract(after, before, out=after)
            difference, number = after.ravel(), before.ravel()
            squares, number_squares = _squares(difference), _squares(number)
            if not math.isfinite(squares) or not math.isfinite(number_squares):
                finite = np.isfinite(difference) & np.isfinite(number)
                self.non_finite += int(finite.size - np.count_nonzero(finite))
                difference, number = difference[finite].astype(np.float64), number[finite].astype(np.float64)
                squares, number_squares = _squares(difference), _squares(number)
        self.squares += squares
        self.number_squares += number_squares
        if difference.size:
            self.max_abs = max(self.max_abs, float(difference.max()), -float(difference.min()))

    def then(self, other: Deviation) -> Deviation:
        """Of numbers converted twice, at most: both may have gone the same way."""
        if not other.squares and not other.non_finite:
            return self
        if not self.squares and not self.non_finite:
            return other
        return Deviation(
            max_abs=self.max_abs + other.max_abs,
            squares=(math.sqrt(self.squares) + math.sqrt(other.squares)) ** 2,
            number_squares=self.number_squares,
            non_finite=max(self.non_finite, other.non_finite),
        )

    def add(self, other: Deviation) -> None:
        """Of other numbers, converted alike."""
        self.max_abs = max(self.max_abs, other.max_abs)
        self.squares += other.squares
        self.number_squares += other.number_squares
        self.non_finite += other.non_finite


def _squares(numbers: NDArray[Any]) -> float:
    return float(np.einsum("i,i->", numbers, numbers))  # not `@`, which may ask several threads


def _decode_floats(name: str, data: Bytes) -> Float32:
    match name:
        case "float32":
            return data.view(np.float32)
        case "float16":
            return data.view(np.float16).astype(np.float32)
        case "bfloat16":
            wide = data.view(np.uint16).astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        case _:
            return _fp8_numbers()[data]


def _encode_floats(name: str, numbers: Float32) -> Bytes:
    numbers = np.ascontiguousarray(numbers)
    match name:
        case "float32":
            return numbers.view(np.uint8)
        case "float16":
            with np.errstate(over="ignore"):
                return numbers.astype(np.float16).view(np.uint8)
        case "bfloat16":
            return _bfloat16(numbers).view(np.uint8)
        case _:
            return _fp8(numbers)


def _bfloat16(numbers: Float32) -> NDArray[np.uint16]:
    """The upper half of a float32, rounded by what is cut off."""
    bits = numbers.view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = np.isnan(numbers)
    if nan.any():
        rounded[nan] = 0x7FC0  # rounding could carry a NaN over to infinity
    return rounded.astype(np.uint16)


def _fp8(numbers: Float32) -> Bytes:
    bits = numbers.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFF_FFFF)
    # The exponent's bias goes from 127 to 7, and the fraction from 23 to 3 bits.
    code = ((magnitude >> np.uint32(20)) & np.uint32(1)) + np.uint32(0x7_FFFF) + magnitude
    code >>= np.uint32(20)
    small = magnitude < _FP8_LEAST_NORMAL_BITS
    np.subtract(code, np.uint32((127 - 7) << 3), out=code, where=~small)
    shifted = magnitude[small].view(np.float32) + _FP8_SUBNORMAL
    code[small] = shifted.view(np.uint32) - _FP8_SUBNORMAL.view(np.uint32)
    np.minimum(code, _FP8_LARGEST, out=code)
    code[np.isnan(numbers)] = 0x7F
    code |= (bits >> np.uint32(24)) & np.uint32(0x80)
    return code.astype(np.uint8)


@cache
def _fp8_numbers() -> Float32:
    """What each of the 256 codes stands for."""
    code = np.arange(256)
    sign, exponent, fraction = 1 - 2 * (code >> 7), (code >> 3) & 15, code & 7
    numbers = np.where(exponent, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9) * sign
    numbers[(code & 0x7F) == 0x7F] = np.nan
    made: Float32 = numbers.astype(np.float32)
    return made


def _quantized(numbers: Float32, bits: int) -> tuple[Bytes, Float32]:
    """Codes, and [heads, 2] scale and zero point."""
    levels = np.float32((1 << bits) - 1)
    with np.errstate(all="ignore"):
        low, high = numbers.min(-1), numbers.max(-1)
        scale = np.maximum(high - low, _SMALLEST_RANGE) / levels
        zero = -low / scale
        codes: NDArray[Any] = numbers / scale[:, None]
        codes += zero[:, None]
        codes += np.float32(0.5)
        np.clip(codes, 0, levels, out=codes)
        if not np.isfinite(scale).all():
            np.nan_to_num(codes, copy=False, nan=0.0)  # what NaN is as an integer, no standard says
        codes = codes.astype(np.uint8)
    if bits == 4:
        half = numbers.shape[-1] // 2
        codes = codes[:, :half] | (codes[:, half:] << 4)
    return codes.ravel(), np.stack([scale, zero], -1)


def _unpacked(codes: Bytes, bits: int) -> Bytes:
    return np.concatenate([codes & 0xF, codes >> 4], -1) if bits == 4 else codes
