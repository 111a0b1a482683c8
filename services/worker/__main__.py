"""`python -m services.worker --role ROLE`: a worker that prefills, decodes or does both, and may change between them.

The one place that composes two services in one process, around one engine; neither knows of the other.
"""

from __future__ import annotations

import sys

from sagellm_common.core.process import leave
from sagellm_common.rpc.model_worker import serve
from sagellm_common.rpc.worker_main import WorkerArgs, worker_main
from services.decode.part import decode_part
from services.prefill.part import prefill_part


async def compose(args: WorkerArgs) -> None:
    await serve(args, prefill_part, decode_part)


if __name__ == "__main__":
    leave(worker_main(None, compose, sys.argv[1:]))
