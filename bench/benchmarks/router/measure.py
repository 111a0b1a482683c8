"""Starts the contestants, and measures them in turns: CPU time of their processes, and what their clients saw."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.benchmarks.router.clients import HttpLine, Line, run, sdk_line, unrouted_line
from sagellm_common.client.router import RouterClient
from sagellm_common.core.types import WorkerAddress
from sagellm_common.rpc.channels import ChannelPool

PROMPT_TOKENS = 1024
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Load:
    """`lines` at a time, `requests` in all, of `num_tokens` each."""

    lines: int
    requests: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Contestant:
    """`processes` by part; `base` is who does the same with nobody between."""

    name: str
    line: Line
    processes: dict[str, int]
    base: str = ""


@dataclass(slots=True)
class Round:
    """One contestant under one load. `cpu_s` by part; `first_s` and `last_s` are medians."""

    cpu_s: dict[str, float]
    wall_s: float
    requests: int
    tokens: int
    first_s: float
    last_s: float


@dataclass(slots=True)
class Measured:
    """{load: {contestant: rounds}}; `skipped` says of whom there are none, and why."""

    rounds: dict[str, dict[str, list[Round]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


async def measure(
    contestants: Sequence[Contestant], loads: dict[str, Load], rounds: int, progress: Callable[[str], None]
) -> Measured:
    found = Measured()
    for contestant in contestants:  # warm
        await run(contestant.line, 4, 100, 2)
    for number in range(rounds):
        for load_name, load in loads.items():
            for contestant in contestants:
                progress(f"round {number + 1} of {rounds}: {load_name}, {contestant.name}")
                by_name = found.rounds.setdefault(load_name, {})
                by_name.setdefault(contestant.name, []).append(await _round(contestant, load))
    return found


async def _round(contestant: Contestant, load: Load) -> Round:
    loop = asyncio.get_running_loop()
    before = {part: cpu_seconds(pid) for part, pid in contestant.processes.items()}
    began_s = loop.time()
    timed = await run(contestant.line, load.lines, load.requests, load.num_tokens)
    wall_s = loop.time() - began_s
    return Round(
        cpu_s={part: cpu_seconds(pid) - before[part] for part, pid in contestant.processes.items()},
        wall_s=wall_s,
        requests=len(timed),
        tokens=len(timed) * load.num_tokens,
        first_s=statistics.median(t.first_s for t in timed),
        last_s=statistics.median(t.last_s for t in timed),
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
    return float(sum(t.user + t.system for t in times))


# ---- who takes part ----


@asynccontextmanager
async def contestants(
    model_path: Path, interval_ms: float, sglang_venv: Path | None, scratch: Path, skipped: dict[str, str]
) -> AsyncIterator[list[Contestant]]:
    """All that can be started; of the others `skipped` says why not."""
    prompt = "the quick brown fox jumps over it " * (PROMPT_TOKENS // 7)
    async with AsyncExitStack() as stack:

        async def start(name: str, argv: Sequence[str], ready: str = "stdout") -> tuple[int, dict[str, Any]]:
            return await stack.enter_async_context(_process(argv, scratch / f"{name}.log"))

        module = "bench.benchmarks.router"
        python = [sys.executable, "-m"]
        pace = ["--interval-ms", str(interval_ms)]
        _, http = await start("http-worker", [*python, f"{module}.http_worker", *pace])
        proxy_pid, proxy = await start("proxy", [*python, f"{module}.proxy", http["address"]])
        settings = [
            "--set",
            "rpc.tokens=direct",
            "--set",
            "router.max_queue=4096",
            "--set",
            "telemetry.log_level=warning",
        ]
        router_pid, router = await start("router", [*python, "services.router", *settings])
        vocab = json.loads((model_path / "config.json").read_text())["vocab_size"]
        mock = ["--router", router["address"], "--model", str(model_path), "--vocab-size", str(vocab), *pace]
        workers = {}
        for role in ("prefill", "decode"):
            _, said = await start(role, [*python, f"{module}.wire_worker", "--role", role, *mock])
            workers[role] = WorkerAddress(f"{role}-0", said["incarnation"], said["address"])
        gateway = [*python, "services.gateway", "--port", "0", "--router", router["address"], *settings]
        gateway_pid, gateway_said = await start("gateway", gateway)
        relayed = await stack.enter_async_context(RouterClient(router["address"], tokens="relayed"))
        direct = await stack.enter_async_context(RouterClient(router["address"], tokens="direct"))
        channels = await stack.enter_async_context(ChannelPool())
        await _until_served(relayed)
        found = [
            Contestant("http, no router", HttpLine.to(http["address"], prompt), {}),
            Contestant("bare proxy", HttpLine.to(proxy["address"], prompt), {"proxy": proxy_pid}, "http, no router"),
        ]
        try:
            pid, address = await _sglang(stack, sglang_venv, http["address"], scratch)
            line = HttpLine.to(address, prompt)
            found.append(Contestant("sglang-router", line, {"router": pid}, "http, no router"))
        except LookupError as why:
            skipped["sglang-router"] = str(why)
        found += [
            Contestant(
                "sagellm gateway",
                HttpLine.to(gateway_said["address"], prompt),
                {"gateway": gateway_pid, "router": router_pid},
                "http, no router",
            ),
            Contestant(
                "wire, no router", unrouted_line(channels, workers["decode"], workers["prefill"], PROMPT_TOKENS), {}
            ),
            Contestant("sagellm relayed", sdk_line(relayed, PROMPT_TOKENS), {"router": router_pid}, "wire, no router"),
            Contestant("sagellm direct", sdk_line(direct, PROMPT_TOKENS), {"router": router_pid}, "wire, no router"),
        ]
        yield found


async def _until_served(client: RouterClient) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while len([w for w in (await client.topology()).workers if w.kv is not None]) < 2:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _process(argv: Sequence[str], log: Path) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Its pid and its ready line, for the time of the block."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"{argv[2]} did not start: {await asyncio.to_thread(_tail, log)}")
        yield process.pid, json.loads(line)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _sglang(stack: AsyncExitStack, venv: Path | None, worker: str, scratch: Path) -> tuple[int, str]:
    """Raises LookupError when it is not there, or does not start."""
    if venv is None:
        raise LookupError("not asked for; --sglang-venv DIR, an environment in which sglang-router is installed")
    command = venv / "bin" / "sglang-router"
    if shutil.which(str(command)) is None:
        raise LookupError(f"{command} is not there: {venv}/bin/pip install sglang-router")
    port, metrics = _free_port(), _free_port()
    argv = [str(command), "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://{worker}"]
    argv += ["--policy", "cache_aware", "--prometheus-port", str(metrics), "--log-level", "warn"]
    log = scratch / "sglang.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=out, stderr=out, env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        )

    async def stop() -> None:
        if process.returncode is None:
            own = psutil.Process(process.pid)
            for member in [*own.children(recursive=True), own]:
                member.kill()
        await process.wait()

    stack.push_async_callback(stop)
    address = f"127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    await run(HttpLine.to(address, "x"), 1, 1, 1)
                    return process.pid, address
                except (OSError, ConnectionError):
                    if process.returncode is not None:
                        break
                    await asyncio.sleep(0.2)
    except TimeoutError:
        pass
    raise LookupError(f"it did not serve: {await asyncio.to_thread(_tail, log)}")


def _tail(log: Path) -> str:
    return log.read_text()[-500:]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
