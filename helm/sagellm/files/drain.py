"""preStop of a worker: no new work from now on; returns when what runs has ended, at most after the grace.

The worker tells the routers through the topology and ends by itself afterwards. Exit code 1: it did not answer; the
SIGTERM that follows drains it too.
"""

import argparse
import os
import sys

import grpc

from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc

ANSWER_S = 5.0
"""For the answer to come, after the grace."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="the worker's gRPC port")
    parser.add_argument("--grace-s", type=float, required=True)
    args = parser.parse_args()
    address = f"{os.environ['SAGELLM_CLUSTER__HOST']}:{args.port}"
    request = worker_pb2.DrainRequest(grace_ms=round(args.grace_s * 1000))
    with grpc.insecure_channel(address) as channel:
        try:
            answer = worker_pb2_grpc.WorkerServiceStub(channel).Drain(request, timeout=args.grace_s + ANSWER_S)
        except grpc.RpcError as err:
            print(f"drain: worker at {address}: {err.code().name}: {err.details()}", file=sys.stderr)
            return 1
    print(f"drained, {answer.unfinished_requests} requests unfinished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
