"""The engine on pip's LMDeploy and on the patched copy, turn by turn: what do our patches cost?

    python -m bench.patches [--quick] [--pairs 40] [--model CHECKPOINT] [--out bench/results/patches.json]

One process each, the same prompts, never both at once; who begins changes from pair to pair, so that a machine that
drifts drifts for both. A pair gives a ratio of medians for each time; the median of the ratios counts, with its 95 %
interval (bootstrap). CPU seconds stand beside the clock's, for other people's load does not count in them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from bench.paired import estimate
from bench.serving_runs import burst, single_engine
from sagellm_common.core.config import Config
from services.cli.models import prepare_smollm2

Tree = Literal["stock", "patched"]
TREES: tuple[Tree, ...] = ("stock", "patched")
TARGET = 0.03
TURN_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Medians over the requests of one turn; cpu_ms is what its process used."""

    ttft_ms: float
    tpot_ms: float
    cpu_ms: float


METRICS = ("ttft_ms", "tpot_ms", "cpu_ms")


@dataclass(frozen=True, slots=True)
class Ratio:
    """patched / stock: median of the pairs, its 95 % interval, and the quartiles of the pairs."""

    median: float
    low: float
    high: float
    quartiles: tuple[float, float]

    @property
    def verdict(self) -> str:
        if max(abs(self.low - 1), abs(self.high - 1)) <= TARGET:
            return "met"
        if self.low > 1 + TARGET or self.high < 1 - TARGET:
            return "MISSED"
        return "undecided: more pairs, or a quieter machine"


def serve(pipe: Connection, tree: Tree, model: str) -> None:
    """The child: a turn for each (prompts, new_tokens) until the parent hangs up."""
    logging.basicConfig(level=logging.WARNING)
    patches = "off" if tree == "stock" else "required"
    config = Config.model_validate({"model": {"path": model}, "engine": {"patches": patches, "num_blocks": 1024}})

    async def turns() -> None:
        async with single_engine(config) as run:
            pipe.send(tree)
            while (work := await asyncio.to_thread(pipe.recv)) is not None:
                prompts, new_tokens = work
                cpu = time.process_time()
                samples, _ = await burst(run, prompts, new_tokens, len(prompts))
                cpu = time.process_time() - cpu
                ttft, tpot = (statistics.median(getattr(s, name) for s in samples) for name in ("ttft_ms", "tpot_ms"))
                pipe.send(Turn(ttft, tpot, 1e3 * cpu))

    asyncio.run(turns())


@contextmanager
def engine_process(tree: Tree, model: Path) -> Iterator[Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, tree, str(model)), daemon=True)
    process.start()
    theirs.close()
    try:
        _answer(ours)
        yield ours
        ours.send(None)
        process.join(30)
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection) -> object:
    if not pipe.poll(TURN_TIMEOUT_S):
        raise TimeoutError(f"an engine did not answer within {TURN_TIMEOUT_S:.0f} s")
    return pipe.recv()


def measure(
    engines: dict[Tree, Connection],
    pairs: int,
    concurrency: int,
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
) -> dict[Tree, list[Turn]]:
    """Two more pairs come first and do not count: they touch memory and fill allocators."""
    turns: dict[Tree, list[Turn]] = {tree: [] for tree in engines}
    rng = np.random.default_rng(concurrency)
    for pair in range(-2, pairs):
        prompts = [rng.integers(3, vocab_size, size=prompt_tokens).tolist() for _ in range(concurrency)]
        order = list(engines) if pair % 2 else list(engines)[::-1]
        for tree in order:
            engines[tree].send((prompts, new_tokens))
            turn = _answer(engines[tree])
            assert isinstance(turn, Turn)
            if pair >= 0:
                turns[tree].append(turn)
        if pair > 0 and pair % 10 == 9:
            print(f"{concurrency} at once: {pair + 1} of {pairs} pairs", file=sys.stderr, flush=True)
    return turns


def ratio(turns: dict[Tree, list[Turn]], metric: str) -> Ratio:
    stock, patched = (np.array([getattr(turn, metric) for turn in turns[tree]]) for tree in ("stock", "patched"))
    ratios = patched / stock
    middle = estimate(ratios.tolist())
    first, third = np.quantile(ratios, (0.25, 0.75))
    return Ratio(middle.value, middle.low, middle.high, (float(first), float(third)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.patches", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="six pairs: shows that it works, and no more")
    parser.add_argument("--pairs", type=int, default=40, help="turns of each engine")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, help="JSON; not written unless given")
    args = parser.parse_args()
    pairs = 6 if args.quick else args.pairs
    model = args.model or prepare_smollm2()
    with ExitStack() as stack:
        engines: dict[Tree, Connection] = {tree: stack.enter_context(engine_process(tree, model)) for tree in TREES}
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        shape = vocab_size, args.prompt_tokens, args.new_tokens
        measured = {c: measure(engines, pairs, c, *shape) for c in args.concurrency}
    found = {c: {metric: ratio(turns, metric) for metric in METRICS} for c, turns in measured.items()}
    print(f"patched / stock, {pairs} pairs: median [95 % interval], quartiles of the pairs; target ±{TARGET:.0%}")
    for concurrency, ratios in found.items():
        for metric, r in ratios.items():
            verdict = "" if metric == "cpu_ms" else r.verdict
            spread = f"[{r.low:.3f}, {r.high:.3f}]  {r.quartiles[0]:.3f}–{r.quartiles[1]:.3f}"
            print(f"  {concurrency:2d} at once  {metric:7s}  {r.median:.3f}  {spread}  {verdict}")
    if args.out:
        args.out.write_text(json.dumps(document(args, model, pairs, measured, found), indent=1) + "\n")
        print(f"written to {args.out}")


def document(
    args: argparse.Namespace,
    model: Path,
    pairs: int,
    measured: dict[int, dict[Tree, list[Turn]]],
    found: dict[int, dict[str, Ratio]],
) -> dict[str, object]:
    return {
        "conditions": {
            "model": model.name,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "pairs": pairs,
            "threads": 1,
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "target": TARGET,
        "ratios": {str(c): {metric: asdict(r) for metric, r in ratios.items()} for c, ratios in found.items()},
        "turns": {str(c): {tree: [asdict(t) for t in turns[tree]] for tree in TREES} for c, turns in measured.items()},
    }


if __name__ == "__main__":
    main()
