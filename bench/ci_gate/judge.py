"""What is compared, how much worse it may be, and when a difference is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.paired import Estimate, median_interval

Round = Mapping[str, float]
Verdict = Literal["ok", "WORSE", "undecided"]

FAMILY_CONFIDENCE = 0.95
"""That no metric at all is called worse by chance."""


@dataclass(frozen=True, slots=True)
class Rule:
    """current / baseline may be `limit` at worst: a lower bound where more is better, else an upper one."""

    metric: str
    limit: float
    more_is_better: bool = False


RULES = (
    Rule("mfu", 0.99, more_is_better=True),
    *(Rule(f"{what}_{which}_ms", 1.05) for what in ("ttft", "tpot") for which in ("p50", "p95")),
    Rule("kv_hit_rate", 1.0, more_is_better=True),
    Rule("comm_share", 1.0),
    Rule("usd_per_million_tokens", 1.0),
)
MIN_ROUNDS = next(n for n in range(2, 100) if 2 / 2**n <= (1 - FAMILY_CONFIDENCE) / len(RULES))
"""With fewer nothing can be told so surely."""


@dataclass(frozen=True, slots=True)
class Finding:
    rule: Rule
    ratio: Estimate

    @property
    def verdict(self) -> Verdict:
        """Decided only where all of the interval is on one side of the limit. What is exactly as before is ok."""
        good, bad = self.ratio.low, self.ratio.high
        if self.rule.more_is_better:
            if good >= self.rule.limit:
                return "ok"
            return "WORSE" if bad < self.rule.limit else "undecided"
        if bad <= self.rule.limit:
            return "ok"
        return "WORSE" if good > self.rule.limit else "undecided"


def ratio(baseline: float, current: float) -> float:
    """Of nothing to nothing: 1."""
    if baseline == current:
        return 1.0
    return current / baseline if baseline else math.inf


def judge(baseline: Sequence[Round], current: Sequence[Round]) -> list[Finding]:
    """Of rounds in pairs: the two of a pair were run one after the other, and did the same. A machine that is slow for
    a while is slow for both. Raises ValueError where they are no pairs."""
    if [found["number"] for found in baseline] != [found["number"] for found in current]:
        raise ValueError("baseline and current did not run the same rounds")
    confidence = 1 - (1 - FAMILY_CONFIDENCE) / len(RULES)
    return [
        Finding(
            rule,
            median_interval(
                [ratio(b[rule.metric], c[rule.metric]) for b, c in zip(baseline, current, strict=True)], confidence
            ),
        )
        for rule in RULES
    ]
