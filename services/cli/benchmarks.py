"""`sagellm bench`: benchmarks are no part of the installed packages, a checkout has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import services
from sagellm_common.core.errors import ConfigError

BENCHMARKS = {
    "autoscale": "the autoscaler on a trace in simulation, beside an oracle, a HPA and fixed sizes",
    "calibrate": "a profile of the simulator, measured on a real CPU cluster and checked against it",
    "chat": "a multi-turn chat on 2P2D with the KV stack on and off, tokens compared",
    "disaggregation": "computing prompts on other workers than they are decoded on, where it pays and where not",
    "index": "the prefix index: hashing and matching of long prompts against many workers' caches",
    "kv": "eviction policies on a trace of block hashes, beside Belady's optimum",
    "placement": "strategies on a real 2P2D cluster, in turns under a mixed workload",
    "plan": "building and optimising execution plans, pass by pass",
    "router": "what router and gateway cost per request and token, beside sglang-router and a bare proxy",
    "strategies": "placement strategies and other routers' rules, on a trace, in simulation",
    "transfer": "KV between two processes over every byte path",
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Exit code of the benchmark, in a process of its own. Raises ConfigError."""
    if name not in BENCHMARKS:
        known = ", ".join(f"{known} ({what})" for known, what in BENCHMARKS.items())
        raise ConfigError(f"bench {name!r}: unknown benchmark; known: {known}")
    return run_module(f"bench.benchmarks.{name}", f"bench {name}", arguments)


def run_module(module: str, command_name: str, arguments: Sequence[str]) -> int:
    """Exit code of a package of `bench/`, in a process of its own. Raises ConfigError where there is no checkout."""
    root = Path(next(iter(services.__path__))).parent
    if not root.joinpath(*module.split("."), "__main__.py").exists():
        raise ConfigError(
            f"{command_name}: benchmarks are not installed in {root}; run `sagellm` from a checkout of the repository "
            "(`make setup` there)"
        )
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
