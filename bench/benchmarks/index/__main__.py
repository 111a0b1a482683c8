"""`sagellm bench index`: hashing long prompts and matching them against the caches of many workers, and its memory."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from bench.benchmarks.index.measure import HOLDERS, LONGEST_TOKENS, ORDERS, PROMPTS, Measured, run
from bench.plots import grouped_bars
from sagellm_common.core.errors import ConfigError

PROMPT_TOKENS = (32 << 10, 128 << 10)
DICT_BLOCKS = 20_000


def measure(workers: int, blocks_per_worker: int, dict_blocks: int) -> list[Measured]:
    """The compiled index as large as asked for, dicts as large as memory should bear."""
    rows = []
    for variant, blocks in (("compiled", blocks_per_worker), ("dict", min(dict_blocks, blocks_per_worker))):
        for order in ORDERS:
            # A process for each, so that memory is what this one took.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows += pool.submit(run, variant, order, workers, blocks, list(PROMPT_TOKENS)).result()
    return rows


def markdown(rows: Sequence[Measured]) -> str:
    head = (
        *("variant", "told", "blocks", "tokens", "hash µs", "match µs", "p99", "sum µs"),
        *("while inserting", "bytes/block", "by itself", "inserts/s", "invalidate ms"),
    )
    body = [
        (
            *(row.variant, row.order, f"{row.workers} x {row.blocks_per_worker:,}", f"{row.prompt_tokens >> 10}K"),
            *(f"{row.hash_us:.0f}", f"{row.match_us:.0f}", f"{row.match_p99_us:.0f}"),
            *(f"{row.hash_us + row.match_us:.0f}", f"{row.match_while_inserting_us:.0f}"),
            *(f"{row.rss_bytes_per_block:.1f}", f"{row.told_bytes_per_block:.1f}"),
            *(f"{row.inserted_per_s:,.0f}", f"{row.invalidate_ms:.2f}"),
        )
        for row in rows
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join([title(rows), "", *lines])


def title(rows: Sequence[Measured]) -> str:
    first = rows[0]
    size = first.workers * first.blocks_per_worker * first.rss_bytes_per_block / 1e9
    return (
        f"{first.workers} workers x {first.blocks_per_worker:,} blocks in {size:.2f} GB; medians over {PROMPTS} "
        f"prompts of {LONGEST_TOKENS >> 10}K tokens in turn, {HOLDERS} workers hold each"
    )


def draw(rows: Sequence[Measured], out: Path) -> None:
    def named(row: Measured) -> str:
        return f"{row.variant}\n{row.order}"

    panels: dict[str, dict[str, dict[str, float]]] = {}
    for tokens in PROMPT_TOKENS:
        some = [row for row in rows if row.prompt_tokens == tokens]
        panels[f"µs for {tokens >> 10}K tokens"] = {
            "hash": {named(row): row.hash_us for row in some},
            "match": {named(row): row.match_us for row in some},
        }
    some = [row for row in rows if row.prompt_tokens == PROMPT_TOKENS[0]]
    panels["bytes per block"] = {"resident": {named(row): row.rss_bytes_per_block for row in some}}
    grouped_bars(panels, title(rows).replace("; ", "\n"), out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sagellm bench index", description=__doc__.partition(": ")[2])
    parser.add_argument("--workers", type=int, default=100, help=f"at least {HOLDERS}")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="per worker; 40 bytes each")
    parser.add_argument("--dict-blocks", type=int, default=DICT_BLOCKS, help="the same of the dicts; 400 bytes each")
    parser.add_argument("--json", type=Path, help="rows go here; the table (.md) and the plot (.png) beside it")
    args = parser.parse_args(argv)
    try:
        if args.workers < HOLDERS or min(args.blocks, args.dict_blocks) < 1:
            raise ConfigError(f"--workers must be at least {HOLDERS}, --blocks and --dict-blocks at least 1")
        rows = measure(args.workers, args.blocks, args.dict_blocks)
    except ConfigError as err:
        print(f"sagellm bench index: {err}", file=sys.stderr)
        return 2
    print(markdown(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        args.json.with_suffix(".md").write_text(markdown(rows) + "\n")
        draw(rows, args.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
