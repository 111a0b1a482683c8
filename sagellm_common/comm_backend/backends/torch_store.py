"""The store of torch.distributed at which members meet, on the interface that it was given."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.core.errors import ConfigError


def open_store(host: str, port: int, timeout_s: float, what: str) -> tuple[TCPStore, str]:
    """A store that listens there (port 0: anywhere), and its address. Raises ConfigError, for `what`."""
    try:
        listener = socket.create_server((host, port))
    except OSError as err:
        raise ConfigError(f"{what} cannot listen on {host}:{port}: {err.strerror}; choose another port") from err
    bound = listener.getsockname()[1]
    # A listener of our own, because the store's would listen on every interface.
    store = TCPStore(
        host,
        bound,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{bound}"
