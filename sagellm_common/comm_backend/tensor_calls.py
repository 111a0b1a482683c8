"""What the members of a group compare before payload moves, and tensors as bytes. The same in all groups."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sagellm_common.comm_backend.protocol import ReduceOp
from sagellm_common.core.errors import InvalidRequest, LayoutMismatch, PeerLost

MAX_DIMS = 8
_CALL = struct.Struct(f"<BBBbB3xi{MAX_DIMS}q")
CALL_BYTES = _CALL.size

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""On the wire a dtype is its place in here: new ones go to the end."""
REDUCIBLE = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_REDUCE_OPS = tuple(ReduceOp)


class Kind(enum.IntEnum):
    JOIN = 1
    MESSAGE = 2
    BROADCAST = 3
    ALL_REDUCE = 4
    ALL_GATHER = 5


@dataclass(frozen=True, slots=True)
class Call:
    """What a member was called with. `op` and `root` where they apply."""

    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    op: ReduceOp = ReduceOp.SUM
    root: int = -1

    @classmethod
    def of(
        cls, kind: Kind, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, root: int = -1, device: str = "cpu"
    ) -> Call:
        """Raises InvalidRequest for a tensor that a group whose tensors are on `device` does not carry."""
        if tensor.device.type != device:
            raise InvalidRequest(f"tensor: is on {tensor.device}, but this group's are on {device}; move it there")
        if tensor.dtype not in DTYPES:
            raise InvalidRequest(f"tensor: dtype {tensor.dtype} cannot be sent; send it viewed as torch.uint8")
        if tensor.dim() > MAX_DIMS:
            raise InvalidRequest(f"tensor: {tensor.dim()} dimensions are too many; view it with at most {MAX_DIMS}")
        if kind is Kind.ALL_REDUCE and tensor.dtype not in REDUCIBLE:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in REDUCIBLE)
            raise InvalidRequest(f"tensor: dtype {tensor.dtype} cannot be reduced; convert it to one of {known}")
        return cls(kind, tensor.dtype, tuple(tensor.shape), op, root)

    def encode(self) -> bytes:
        dims = (*self.shape, *[0] * (MAX_DIMS - len(self.shape)))
        return _CALL.pack(
            1, self.kind, DTYPES.index(self.dtype), len(self.shape), _REDUCE_OPS.index(self.op), self.root, *dims
        )

    @classmethod
    def decode(cls, encoded: bytes | bytearray | memoryview) -> Call:
        """Raises PeerLost for what is no call."""
        version, kind, dtype, num_dims, op, root, *dims = _CALL.unpack(encoded)
        known = version == 1 and dtype < len(DTYPES) and 0 <= num_dims <= MAX_DIMS and op < len(_REDUCE_OPS)
        if not known or kind not in Kind.__members__.values() or min(dims) < 0:
            raise PeerLost(f"a member of the group does not speak this protocol: {bytes(encoded)!r}")
        return cls(Kind(kind), DTYPES[dtype], tuple(dims[:num_dims]), _REDUCE_OPS[op], root)

    def __str__(self) -> str:
        of = f" {self.op.value}" if self.kind is Kind.ALL_REDUCE else ""
        at = f" of root {self.root}" if self.kind is Kind.BROADCAST else ""
        return f"{self.kind.name.lower()}{of}{at} of {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def agreed(calls: Mapping[int, Call]) -> None:
    """Raises LayoutMismatch naming the first two of these calls, by rank, that do not go together."""
    (one, first), *others = sorted(calls.items(), key=lambda item: item[0])
    for rank, call in others:
        ragged = call.kind is first.kind is Kind.ALL_GATHER and call.dtype == first.dtype
        if call != first and not ragged:
            raise LayoutMismatch(f"group: rank {one} called {first}, rank {rank} called {call}")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: shape [bytes], the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def check_rank(name: str, rank: int, size: int, *, but: int | None = None) -> None:
    if not 0 <= rank < size or rank == but:
        raise InvalidRequest(f"{name}: there is no other rank {rank} in a group of {size}")


def rank_of(address: str, members: Sequence[str]) -> int:
    if len(set(members)) != len(members) or address not in members:
        raise InvalidRequest(f"members: {list(members)} must be different addresses, and one of them {address!r}, ours")
    return members.index(address)
