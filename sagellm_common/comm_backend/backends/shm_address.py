"""Where a source of the shm byte path listens, and whether it can be reached from here."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from sagellm_common.core.errors import ConfigError, PeerLost
from sagellm_common.core.types import KvSource

SCHEME = "shm"


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """`shm:HOST:NAMESPACE:NAME`: the boot id of a host, a network namespace on it, and a Unix socket there.

    Sockets with abstract names are a network namespace's own, and gone with the process that made them.
    """

    host: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}:{self.host}:{self.namespace}:{self.name}"

    @property
    def socket_name(self) -> str:
        """Abstract: it begins with a zero byte."""
        return f"\0sagellm-kv-{self.name}"


def own_address() -> ShmAddress:
    """A new one in this process's namespace."""
    host, namespace = _here()
    return ShmAddress(host, namespace, f"{os.getpid()}-{secrets.token_hex(8)}")


def reachable_address(source: KvSource) -> ShmAddress:
    """The source's. Raises ConfigError naming what lies between, PeerLost for something that is no such address."""
    scheme, *parts = source.data_address.split(":")
    if scheme != SCHEME or len(parts) != 3 or not all(parts):
        raise PeerLost(f"KV source: address {source.data_address!r} is not shm:HOST:NAMESPACE:NAME")
    address = ShmAddress(*parts)
    host, namespace = _here()
    for what, theirs, ours in (
        ("another host, with boot id", address.host, host),
        ("another network namespace,", address.namespace, namespace),
    ):
        if theirs != ours:
            raise ConfigError(
                f"transport.backend is 'shm', but source {source.worker_id!r} is on {what} {theirs} (here: {ours}): "
                "set transport.backend=tcp for the cluster"
            )
    return address


def _here() -> tuple[str, str]:
    """(boot id, inode of the network namespace) of this process."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot_id, str(os.stat("/proc/self/ns/net").st_ino)
