"""Requests to simulate: from Mooncake's and Azure's published formats, or drawn from a Poisson or bursty process."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

from sagellm_common.core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class SimRequest:
    """`blocks` name the prompt's prefixes, `block_tokens` each but the last; a trace without them shares nothing."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    priority: int = 0


def load_trace(path: Path, form: str) -> list[SimRequest]:
    """By arrival, the first at 0 s. Raises ConfigError naming the line that is no request."""
    try:
        with path.open(newline="") as lines:
            requests = list(FORMATS[form](lines, str(path)))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--trace {path}: {err}") from err
    if not requests:
        raise ConfigError(f"--trace {path}: there is no request in it")
    first = min(request.arrival_s for request in requests)
    return sorted((replace(r, arrival_s=r.arrival_s - first) for r in requests), key=lambda r: r.arrival_s)


def _mooncake(lines: Iterable[str], where: str) -> Iterator[SimRequest]:
    """`{"timestamp": ms, "input_length", "output_length", "hash_ids": [per 512 tokens]}` a line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            prompt, output = int(row["input_length"]), int(row["output_length"])
            request = SimRequest(float(row["timestamp"]) / 1e3, prompt, output, blocks)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ConfigError(
                f"{where}:{number}: {err!r}; the mooncake format has timestamp (ms), input_length, output_length and "
                "hash_ids in a JSON object a line"
            ) from None
        yield _checked(request, f"{where}:{number}")


def _azure(lines: TextIO, where: str) -> Iterator[SimRequest]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`, as Azure's LLM inference traces of 2023 and 2024."""
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            # Seven digits of a second's fraction in the file; Python reads six.
            text = row["TIMESTAMP"].replace("Z", "+00:00")
            head, dot, tail = text.partition(".")
            zone = next((tail[i:] for i, c in enumerate(tail) if c in "+-"), "")
            arrival = datetime.fromisoformat(f"{head}{dot}{tail[: len(tail) - len(zone)][:6]}{zone}").timestamp()
            request = SimRequest(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ConfigError(
                f"{where}:{number}: {err!r}; the azure format has the columns TIMESTAMP, ContextTokens, GeneratedTokens"
            ) from None
        yield _checked(request, f"{where}:{number}")


FORMATS: dict[str, Callable[[TextIO, str], Iterator[SimRequest]]] = {"mooncake": _mooncake, "azure": _azure}


def _checked(request: SimRequest, where: str) -> SimRequest:
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        raise ConfigError(
            f"{where}: a prompt of {request.prompt_tokens} and an answer of {request.output_tokens} tokens; at least 1 "
            "and 0 are needed"
        )
    return request if request.output_tokens else replace(request, output_tokens=1)


def scaled(requests: Sequence[SimRequest], rate_scale: float) -> list[SimRequest]:
    """The same requests, `rate_scale` times as often."""
    return [replace(request, arrival_s=request.arrival_s / rate_scale) for request in requests]


def generated(
    count: int,
    rate_rps: float,
    *,
    seed: int,
    prompt_tokens: float = 1024.0,
    output_tokens: float = 128.0,
    burstiness: float = 1.0,
    shared_prefixes: int = 0,
) -> list[SimRequest]:
    """Lognormal lengths with these means; gaps are gamma-distributed, `burstiness` their squared coefficient of
    variation (1: Poisson). With `shared_prefixes`, half of each prompt is one of so many, Zipf-distributed."""
    rng, now_s, requests = random.Random(seed), 0.0, []
    for index in range(count):
        now_s += rng.gammavariate(1 / burstiness, burstiness / rate_rps)
        prompt = max(1, round(prompt_tokens * rng.lognormvariate(-0.5, 1.0)))
        output = max(1, round(output_tokens * rng.lognormvariate(-0.5, 1.0)))
        blocks: tuple[int, ...] = ()
        if shared_prefixes:
            prefix = min(int(rng.paretovariate(1.0)), shared_prefixes)
            half, rest = prompt // 2 // MOONCAKE_BLOCK_TOKENS, -(-prompt // MOONCAKE_BLOCK_TOKENS)
            own = (count + index) << 20
            blocks = tuple([-(prefix << 20) - i for i in range(half)] + [own + i for i in range(rest - half)])
        requests.append(SimRequest(now_s, prompt, output, blocks))
    return requests
