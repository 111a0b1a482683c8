"""Requests to simulate: from Mooncake's and Azure's published formats, or drawn from a Poisson or bursty process."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sagellm_common.core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_IS = (
    "the mooncake format has timestamp (ms), input_length, output_length and hash_ids, one for each "
    f"{MOONCAKE_BLOCK_TOKENS} tokens, in a JSON object a line"
)
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
AZURE_IS = f"the azure format has the columns {', '.join(AZURE_COLUMNS)}"
GZIP_MAGIC = b"\x1f\x8b"

T = TypeVar("T")


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
    """By arrival, the first at 0 s; gzipped or not. Raises ConfigError naming the line that is no request."""
    try:
        with _opened(path) as lines:
            requests = list(FORMATS[form](lines, str(path)))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as err:
        raise ConfigError(f"--trace {path}: {err}") from err
    if not requests:
        raise ConfigError(f"--trace {path}: there is no request in it")
    first = min(request.arrival_s for request in requests)
    return sorted((replace(r, arrival_s=r.arrival_s - first) for r in requests), key=lambda r: r.arrival_s)


def _opened(path: Path) -> TextIO:
    with path.open("rb") as file:
        gzipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    if gzipped:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _mooncake(lines: TextIO, where: str) -> Iterator[SimRequest]:
    """`{"timestamp": ms, "input_length", "output_length", "hash_ids": [per 512 tokens]}` a line."""
    named = fitting = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        try:
            row = json.loads(line)
        except ValueError as err:
            raise ConfigError(f"{at}: {err}; {MOONCAKE_IS}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{at}: {_shown(row)} is no JSON object; {MOONCAKE_IS}")
        fields = _Fields(row, at, MOONCAKE_IS)
        blocks = fields.read("hash_ids", _block_ids) if "hash_ids" in row else ()
        prompt, answer = fields.read("input_length", _at_least_1), fields.read("output_length", _at_least_0)
        named, fitting = named + len(blocks), fitting + -(-prompt // MOONCAKE_BLOCK_TOKENS)
        yield SimRequest(fields.read("timestamp", _finite) / 1e3, prompt, _answered(answer), blocks)
    if named > 1.5 * fitting:
        raise ConfigError(
            f"{where}: {named} hash_ids for prompts of {fitting} blocks of {MOONCAKE_BLOCK_TOKENS} tokens: they name "
            f"smaller ones; {MOONCAKE_IS}"
        )


def _azure(lines: TextIO, where: str) -> Iterator[SimRequest]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`, as Azure's LLM inference traces of 2023 and 2024."""
    rows = csv.DictReader(lines, skipinitialspace=True)
    for column in AZURE_COLUMNS:
        if rows.fieldnames is not None and column not in rows.fieldnames:
            raise ConfigError(f"{where}:1: there is no column {column}; {AZURE_IS}")
    for row in rows:
        fields = _Fields(row, f"{where}:{rows.line_num}", AZURE_IS)
        prompt, answer = fields.read("ContextTokens", _at_least_1), fields.read("GeneratedTokens", _at_least_0)
        yield SimRequest(fields.read("TIMESTAMP", _utc_seconds), prompt, _answered(answer))


FORMATS: dict[str, Callable[[TextIO, str], Iterator[SimRequest]]] = {"mooncake": _mooncake, "azure": _azure}


@dataclass(frozen=True, slots=True)
class _Fields:
    """Of one line, `where` and of which `form` it says where a field is wrong."""

    row: Mapping[str, Any]
    where: str
    form: str

    def read(self, name: str, parse: Callable[[Any], T]) -> T:
        """Raises ConfigError."""
        if self.row.get(name) is None:
            raise ConfigError(f"{self.where}: {name} is missing; {self.form}")
        try:
            return parse(self.row[name])
        except (ValueError, TypeError, OverflowError) as err:
            raise ConfigError(f"{self.where}: {name} {_shown(self.row[name])}: {err}; {self.form}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _whole(value: Any) -> int:
    """Of a number or its text, as a CSV file has it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError):
        number = math.nan
    if not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def _at_least_0(value: Any) -> int:
    if (found := _whole(value)) < 0:
        raise ValueError("must be at least 0")
    return found


def _at_least_1(value: Any) -> int:
    if (found := _whole(value)) < 1:
        raise ValueError("must be at least 1")
    return found


def _answered(tokens: int) -> int:
    """A request without an answer has one token: it ends with that."""
    return max(1, tokens)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(found := float(value)):
        raise ValueError("must be a finite number")
    return found


def _block_ids(value: Any) -> tuple[int, ...]:
    """Folded to 64 bits, as the simulator keeps them."""
    if not isinstance(value, list) or not all(type(block) is int for block in value):
        raise ValueError("must be a list of integers")
    return tuple((block + _HALF) % (2 * _HALF) - _HALF for block in value)


_HALF = 1 << 63


def _utc_seconds(text: str) -> float:
    """Where the file names no zone, UTC: in a local one an hour may come twice."""
    # Seven digits of a second's fraction in the file; Python reads six.
    head, dot, tail = text.strip().replace("Z", "+00:00").partition(".")
    zone = next((tail[i:] for i, c in enumerate(tail) if c in "+-"), "")
    at = datetime.fromisoformat(f"{head}{dot}{tail[: len(tail) - len(zone)][:6]}{zone}")
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


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
