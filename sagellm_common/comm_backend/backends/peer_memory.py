"""The KV memory of another process of this host, as it is read from here."""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import c_int, c_ssize_t, c_ulong, c_void_p
from typing import Protocol

import numpy as np

from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.pieces import Offsets, Pieces, checked, copy, digests
from sagellm_common.comm_backend.wire import IOV_MAX
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.shared_memory import map_file

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = c_ssize_t
_libc.process_vm_readv.argtypes = (c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong)


class PeerMemory(Protocol):
    def copy(self, offsets: Offsets, into: Pieces, *, digest: bool) -> bytes:
        """Fills `into`, piece after piece, with what is at `offsets`; with `digest`, the digest of each.

        Raises MalformedFrame for offsets outside the memory, OSError when the process is gone.
        """


class MappedMemory:
    """A memory file, mapped. It stays after its process is gone."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Raises MalformedFrame for a file that may shrink under the reader."""
        try:
            self._view = map_file(descriptor, num_bytes)
        except ValueError as err:
            raise MalformedFrame(f"shows {err}") from err

    def copy(self, offsets: Offsets, into: Pieces, *, digest: bool) -> bytes:
        return copy(_within(self._view, offsets, into), into, digest=digest)


class ProcessMemory:
    """Private memory of a process, read with a system call per thousand pieces."""

    def __init__(self, worker_id: str, pid: int, address: int, num_bytes: int) -> None:
        """`pid` as the kernel told it for the connection. Raises ConfigError where it could not."""
        if not pid:
            raise ConfigError(
                f"transport.backend is 'shm', but source {worker_id!r} is in another PID namespace and its KV memory "
                "in no file: let the containers share one, or set transport.backend=tcp for the cluster"
            )
        self._worker_id, self._pid = worker_id, pid
        self._address, self._num_bytes = address, num_bytes

    def copy(self, offsets: Offsets, into: Pieces, *, digest: bool) -> bytes:
        if len(offsets) and (offsets.min() < 0 or (offsets + into.sizes).max() > self._num_bytes):
            raise MalformedFrame(f"names bytes outside of its memory of {self._num_bytes}")
        for at in range(0, len(offsets), IOV_MAX):
            self._read(offsets[at : at + IOV_MAX], into[at : at + IOV_MAX])
        return digests(into) if digest else b""

    def _read(self, offsets: Offsets, into: Pieces) -> None:
        ours = into.vectors()
        theirs = np.column_stack([offsets + self._address, into.sizes]).astype(np.uint64)
        done = _libc.process_vm_readv(self._pid, ours.ctypes.data, len(ours), theirs.ctypes.data, len(theirs), 0)
        if done == into.num_bytes:
            return
        code = ctypes.get_errno() if done < 0 else errno.EFAULT
        if code == errno.EPERM:
            raise ConfigError(
                f"transport.backend is 'shm', but process_vm_readv may not read source {self._worker_id!r}, whose KV "
                "memory is in no file: allow ptrace (CAP_SYS_PTRACE, or kernel.yama.ptrace_scope=0), or set "
                "transport.backend=tcp for the cluster"
            )
        raise OSError(code, f"process {self._pid} cannot be read: {os.strerror(code)}")


def _within(view: memoryview, offsets: Offsets, into: Pieces) -> Pieces:
    try:
        return checked(view, offsets, into.sizes)
    except IndexError as err:
        raise MalformedFrame(f"names {err}") from err
