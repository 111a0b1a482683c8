"""Checks the engine on this machine's GPU and measures it: about ten minutes on an H200.

    python -m bench.gpu_check [--shapes 1B,8B] [--eager] [--out bench/results/gpu_check.json]
    python -m bench.gpu_check --dry-run      everything, on the CPU, with a tiny model: does the command itself work?

It makes Llama checkpoints with random weights, runs them through the engine with stock and with patched LMDeploy and
through prefill and decode in two processes on the one GPU, and holds the tokens against transformers.

Exit codes: 0 all is well, 1 a check failed, 2 something is missing here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

EXIT_FAILED, EXIT_MISSING = 1, 2
RESULT = Path(__file__).parents[1] / "results" / "gpu_check.json"

NEEDED = {
    "numpy": "",
    "torch": "",
    "transformers": "",
    "safetensors": "",
    "tokenizers": "",
    "lmdeploy": "--no-deps lmdeploy==0.11.0; its shared libraries are not needed",
    "xgrammar": "--no-deps xgrammar",
    "mmengine": "mmengine-lite",
    "addict": "",
    "yapf": "",
    "platformdirs": "",
    "termcolor": "",
    "pydantic": "",
    "pydantic_core": "in the version pydantic names",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "prometheus_client": "",
    "psutil": "",
    "requests": "",
    "sentencepiece": "",
    "shortuuid": "",
    "tiktoken": "",
    "xxhash": "",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
    "PIL": "pillow",
}
"""What is imported on the way → what to give pip, where that has another name."""


def missing_packages() -> list[str]:
    return [
        f"the Python package {name} is not installed: pip install {how or name}"
        for name, how in NEEDED.items()
        if importlib.util.find_spec(name) is None
    ]


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def table(rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left; a heading above."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def verdicts(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Rows (check, result, verdict)."""
    greedy = found["greedy_against_transformers"]
    rows = [
        [
            f"{name} greedy tokens against transformers",
            f"{greedy['best_in_float32']}/{greedy['tokens']} best in float32, worst gap {greedy['worst_gap']:.2g}, "
            f"rounding {greedy['rounding']:.2g}",
            _verdict(greedy["ok"]),
        ]
    ]
    for key in ("patched_equals_stock", "disaggregated_equals_single"):
        compared = found[key]
        differing = f", {len(compared['differs'])} differ" if compared["differs"] else ""
        result = f"{compared['sequences']} sequences, {compared['tokens']} tokens{differing}"
        rows.append([f"{name} {key.replace('_', ' ')}", result, _verdict(compared["ok"])])
    return rows


def speeds(name: str, found: dict[str, Any], judged: bool) -> list[list[str]]:
    """Rows (metric, stock, patched, how much slower, verdict if it is judged)."""
    rows = []
    for metric, measured in found["speed"].items():
        values = [f"{measured[engine]:,.2f}" for engine in ("stock", "patched")]
        slower = f"{100 * measured['slower']:+.2f} %"
        rows.append([f"{name} {metric}", *values, slower, _verdict(measured["ok"]) if judged else "not judged"])
    used = found["utilisation"]
    share = f"{100 * used['mfu']:.1f} %" if used["mfu"] is not None else "peak unknown"
    rows.append([f"{name} prefill MFU", "", share, "", ""])
    rows.append([f"{name} prefill, of a matrix product", "", f"{100 * used['of_a_matrix_product']:.1f} %", "", ""])
    rows.append([f"{name} transfer GB/s", "", f"{found['transfer']['gb_per_s']:.2f}", "", ""])
    return rows


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def run(settings: Any, out: Path | None) -> int:
    """Checks, measures, prints, and writes the document to `out`; returns the exit code."""
    from bench.gpu_check.measure import check_shape, describe, matmul_flops, utilisation
    from bench.gpu_check.shapes import SHAPES

    began, ceiling = time.time(), matmul_flops(settings)
    print(f"a matrix product reaches {ceiling / 1e12:,.3g} TFLOP/s here", flush=True)
    results: dict[str, Any] = {}
    for name in settings.shapes:
        print(name, flush=True)
        found = results[name] = check_shape(settings, name, say)
        gpu = found["engines"]["patched"].get("gpu", "")
        rate = found["speed"]["prefill_tokens_per_s"]["patched"]
        found["utilisation"] = utilisation(settings, SHAPES[name], rate, gpu, ceiling)
    checks = [row for name, found in results.items() for row in verdicts(name, found)]
    dry = settings.device == "cpu"  # whose steps are so short that their noise is far above a per cent
    measured = [row for name, found in results.items() for row in speeds(name, found, judged=not dry)]
    print("\n" + table([["check", "result", ""], *checks]))
    print("\n" + table([["measured", "stock", "patched", "slower by", "at most 1 %"], *measured]))
    failed = [row[0] for row in (*checks, *measured) if row[-1] == "FAILED"]
    document = {
        "conditions": {
            "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
            "seconds": round(time.time() - began),
            "python": platform.python_version(),
            "dry_run": dry,
            "matmul_flops_per_s": ceiling,
            **describe(settings),
        },
        "shapes": results,
        "failed": failed,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwritten to {out}")
    if failed:
        print(f"FAILED: {'; '.join(failed)}", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--shapes", default="", metavar="1B,8B", help="which models")
    parser.add_argument("--rounds", type=int, default=0, help="turns of the comparison")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu_check.json; a dry run writes none")
    args = parser.parse_args(argv)
    if missing := missing_packages():
        print("gpu_check: something is missing here:\n  " + "\n  ".join(missing), file=sys.stderr)
        return EXIT_MISSING
    from bench.gpu_check.measure import DRY_RUN, FULL
    from bench.gpu_check.shapes import SHAPES
    from bench.gpu_check.worker import Failed
    from sagellm_common.comm_backend.hardware import select_device
    from sagellm_common.core.errors import ConfigError

    settings = DRY_RUN if args.dry_run else FULL
    shapes = tuple(filter(None, args.shapes.split(","))) or settings.shapes
    if unknown := [name for name in shapes if name not in SHAPES]:
        parser.error(f"--shapes {','.join(unknown)}: known are {', '.join(SHAPES)}")
    settings = replace(
        settings,
        shapes=shapes,
        rounds=args.rounds or settings.rounds,
        cuda_graphs=settings.cuda_graphs and not args.eager,
    )
    try:
        select_device(settings.device)
        return run(settings, args.out or (None if args.dry_run else RESULT))
    except ConfigError as error:
        print(f"gpu_check: {error.message}", file=sys.stderr)
        return EXIT_MISSING
    except Failed as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
