"""`python -m services.prefill`: a prefill worker, for life; `services.worker` is one whose role can change."""

from __future__ import annotations

import sys

from sagellm_common.core.process import leave
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.model_worker import serve
from sagellm_common.rpc.worker_main import WorkerArgs, worker_main
from services.prefill.part import prefill_part


async def compose(args: WorkerArgs) -> None:
    await serve(args, prefill_part)


if __name__ == "__main__":
    leave(worker_main(WorkerRole.PREFILL, compose, sys.argv[1:]))
