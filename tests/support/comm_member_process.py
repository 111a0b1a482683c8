"""A member of two groups as a process of its own, to be stopped and killed.

    python -m tests.support.comm_member_process BACKEND ADDRESS_OF_THE_OTHER

Prints its address, then `joined`, and waits.
"""

from __future__ import annotations

import asyncio
import sys

from sagellm_common.comm_backend.backends import open_comm
from tests.support.comm_groups import HOST

TIMEOUT_S = 60.0


async def main(backend: str, other: str) -> None:
    end = open_comm(backend, HOST, 0)
    members = [other, await end.start()]
    print(end.address, flush=True)
    groups = [await end.join(name, members, timeout_s=TIMEOUT_S) for name in ("one", "two")]
    print("joined", len(groups), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
