"""The kernels in C++ behind `ops.py`, through ctypes. `csrc/sagellm_cpu.h` is the other side: keep both alike."""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.build import build, library_path, supported_isas
from sagellm_common.engines.lmdeploy.kernels.ops import (
    HEAD_DIMS,
    Batch,
    DecoderLayer,
    DecoderShape,
    KvLayer,
    LayerDone,
    Linear,
    Planes,
)

log = logging.getLogger(__name__)

KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


_LayerDone = ctypes.CFUNCTYPE(None, c_int64)


class _Cache(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_stride", c_int64),
        ("layer_stride", c_int64),
        ("block_tokens", c_int64),
        ("type", c_int64),
    )


class _Batch(Structure):
    _fields_ = (
        ("sequences", c_int64),
        ("q_starts", c_void_p),
        ("kv_lens", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "planes")),
        ("norm_eps", c_float),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sage_isa": (ctypes.c_char_p, ()),
    "sage_paged_attention": (
        c_int,
        (
            *(c_void_p, c_int64) * 3,
            POINTER(_Cache),
            POINTER(_Batch),
            *(c_int64,) * 3,
            c_float,
            c_void_p,
            c_int64,
        ),
    ),
    "sage_linear_pack": (c_void_p, (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64)),
    "sage_linear_free": (None, (c_void_p,)),
    "sage_linear_bits": (c_int64, (c_void_p,)),
    "sage_linear_bytes": (c_int64, (c_void_p,)),
    "sage_linear": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_int64)),
    "sage_decoder_create": (c_void_p, (POINTER(_Model), c_void_p, c_void_p, c_void_p)),
    "sage_decoder_free": (None, (c_void_p,)),
    "sage_decoder_layer": (None, (c_void_p, c_int64, *(c_void_p,) * 6)),
    "sage_decoder_forward": (c_int, (c_void_p, c_void_p, POINTER(_Cache), POINTER(_Batch), _LayerDone, c_int64)),
}


@functools.cache
def _open(path: str) -> Any:
    library = ctypes.CDLL(path)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _check(status: int) -> None:
    if status:
        raise MemoryError("the CPU kernels found no memory for this batch; lower engine.max_prefill_tokens")


def _cache(layer: KvLayer, layer_stride: int = 0) -> _Cache:
    keys, values = layer[0], layer[1]
    return _Cache(keys.data_ptr(), values.data_ptr(), keys.stride(0), layer_stride, keys.size(1), KV_TYPES[keys.dtype])


def _batch(batch: Batch) -> _Batch:
    """Points into `batch`'s tensors: keep it alive."""
    return _Batch(
        batch.kv_lens.numel(),
        batch.q_starts.data_ptr(),
        batch.kv_lens.data_ptr(),
        batch.tables.data_ptr(),
        batch.tables.stride(0),
    )


class NativeLinear:
    def __init__(self, library: Any, weight: Tensor, bias: Tensor | None, planes: Planes) -> None:
        weight = _float32(weight)
        bias = None if bias is None else _float32(bias)
        self._library = library
        self._rows, self._columns = weight.shape
        pointer = library.sage_linear_pack(
            weight.data_ptr(),
            self._rows,
            self._columns,
            0 if bias is None else bias.data_ptr(),
            planes,
            torch.get_num_threads(),
        )
        if not pointer:
            raise MemoryError(f"no memory for a quantised layer of {self._rows} x {self._columns}")
        self.pointer: int = pointer
        self.bits: int = library.sage_linear_bits(pointer)
        self.size_bytes: int = library.sage_linear_bytes(pointer)
        weakref.finalize(self, library.sage_linear_free, pointer)

    def __call__(self, x: Tensor) -> Tensor:
        x = _float32(x)
        y = torch.empty(x.size(0), self._rows)
        _check(self._library.sage_linear(self.pointer, x.data_ptr(), x.size(0), y.data_ptr(), torch.get_num_threads()))
        return y


class NativeDecoder:
    def __init__(
        self,
        library: Any,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        cosines: Tensor,
        sines: Tensor,
    ) -> None:
        self._library = library
        self._kept: list[Any] = [final_norm, cosines, sines, *layers]  # C++ keeps pointers into these
        model = _Model(
            len(layers),
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.intermediate,
            shape.planes,
            shape.norm_eps,
        )
        tensors = [cosines, sines, final_norm, *(t for layer in layers for t in (layer.attention_norm, layer.mlp_norm))]
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        pointer = library.sage_decoder_create(byref(model), cosines.data_ptr(), sines.data_ptr(), final_norm.data_ptr())
        if not pointer:
            raise MemoryError("no memory for a decoder")
        self._pointer: int = pointer
        weakref.finalize(self, library.sage_decoder_free, pointer)
        for i, layer in enumerate(layers):
            parts = (layer.qkv, layer.output, layer.gate_up, layer.down)
            assert all(isinstance(part, NativeLinear) for part in parts)
            library.sage_decoder_layer(
                pointer,
                i,
                layer.attention_norm.data_ptr(),
                layer.mlp_norm.data_ptr(),
                *(part.pointer for part in parts if isinstance(part, NativeLinear)),
            )

    def __call__(
        self, hidden: Tensor, caches: Sequence[KvLayer], batch: Batch, layer_done: LayerDone | None = None
    ) -> Tensor:
        assert hidden.dtype == torch.float32 and hidden.is_contiguous()
        first = caches[0][0]
        layer_bytes = caches[1][0].data_ptr() - first.data_ptr() if len(caches) > 1 else 0
        status = self._library.sage_decoder_forward(
            self._pointer,
            hidden.data_ptr(),
            byref(_cache(caches[0], layer_bytes // first.element_size())),
            byref(_batch(batch)),
            _LayerDone(layer_done) if layer_done else _LayerDone(),
            torch.get_num_threads(),
        )
        _check(status)
        return hidden


class NativeOps:
    """One compiled library. As many threads as torch.get_num_threads() says compute."""

    def __init__(self, isa: str) -> None:
        """Raises OSError when the library was not built, see `build.py`."""
        self._library = _open(str(library_path(isa)))
        self.name: str = self._library.sage_isa().decode()

    def paged_attention(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, cache: KvLayer, batch: Batch, scale: float
    ) -> Tensor:
        tokens, heads, head_dim = query.shape
        rows = [(t, 0 if t is None else t.data_ptr(), 0 if t is None else t.stride(0)) for t in (query, key, value)]
        # Heads of a token lie side by side; tokens may be further apart (slices of one qkv tensor).
        assert all(t is None or (t.dtype == torch.float32 and t.stride()[1:] == (head_dim, 1)) for t, _, _ in rows)
        out = torch.empty(tokens, heads, head_dim)
        status = self._library.sage_paged_attention(
            *(number for _, pointer, stride in rows for number in (pointer, stride)),
            byref(_cache(cache)),
            byref(_batch(batch)),
            heads,
            cache[0].size(2),
            head_dim,
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)
        return out

    def linear(self, weight: Tensor, bias: Tensor | None, planes: Planes) -> Linear:
        return NativeLinear(self._library, weight, bias, planes)

    def decoder(
        self, shape: DecoderShape, layers: Sequence[DecoderLayer], final_norm: Tensor, cosines: Tensor, sines: Tensor
    ) -> NativeDecoder:
        assert shape.head_dim in HEAD_DIMS
        return NativeDecoder(self._library, shape, layers, final_norm, cosines, sines)


@functools.cache
def native_ops() -> NativeOps | None:
    """The best library this CPU can run and that was built; None, with a line in the log, where there is none."""
    isas = supported_isas()
    for isa in isas:
        if library_path(isa).is_file():
            return NativeOps(isa)
    why = f"not built for {isas[0]}; run `python -m {build.__module__}`" if isas else "this CPU lacks AVX2"
    log.warning("CPU kernels: %s. torch computes instead, slower", why)
    return None
