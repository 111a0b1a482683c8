"""`python -m …device_cpu.rank FD`: one rank of a tensor-parallel engine. Does as it is told over the pipe FD."""

from __future__ import annotations

import asyncio
import pickle
import sys
from multiprocessing.connection import Connection

import torch

from sagellm_common.engines.lmdeploy.device_cpu.install import install


def serve(pipe: Connection) -> None:
    """Until the worker closes the pipe. Any failure ends the process, and with it rank 0's next collective."""
    from sagellm_common.engines.lmdeploy.device_cpu import tensor_parallel

    setup: tensor_parallel.RankSetup = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(setup.num_threads)
    agent = tensor_parallel.build_agent(setup)
    with asyncio.Runner() as runner, torch.inference_mode():
        while True:
            operation, args = pickle.loads(pipe.recv_bytes())
            if operation == "build_cache_engine":
                agent.build_cache_engine(setup.pool_fd)
            elif operation == "step":
                with agent.all_context():
                    runner.run(agent._async_step_background(**args[0]))
            else:
                getattr(agent, operation)(*args)


def main(pipe_fd: int) -> int:
    install()
    with Connection(pipe_fd) as pipe:
        try:
            serve(pipe)
        except (EOFError, ConnectionResetError):
            return 0  # the worker is done, or gone
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
