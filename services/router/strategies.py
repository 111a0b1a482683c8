"""Which strategy places which requests: one for all, and others for classes of them; to be changed while it serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sagellm_common.core.config import RouterConfig
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies import (
    STRATEGIES,
    Placement,
    RequestView,
    Strategy,
    WorkerView,
    make_strategy,
)

BLIND = frozenset({"fifo", "priority"})
"""They do not ask what anything costs."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The strategy of a class ("": of all that have none of their own), and how many requests it has placed there."""

    service_class: str
    strategy: str
    order: Order
    placed: int


@dataclass(slots=True)
class _Line:
    strategy: Strategy
    placed: int = 0


class Strategies:
    """A `Strategy` itself: asks that of the request's class. `order` and `fair` are those of the one for all."""

    def __init__(self, config: RouterConfig, costs: CostModel, on_asked: Callable[[], None] = lambda: None) -> None:
        """Raises ConfigError for an unknown strategy. `on_asked` is called when one comes that asks for costs."""
        self._config = config
        self._costs = costs
        self._on_asked = on_asked
        self._lines = {"": _Line(make_strategy(config.strategy, costs))}
        for name, service_class in config.classes.items():
            if service_class.strategy is not None:
                self._lines[name] = _Line(make_strategy(service_class.strategy, costs))

    @property
    def name(self) -> str:
        return self._lines[""].strategy.name

    @property
    def order(self) -> Order:
        return self._lines[""].strategy.order

    @property
    def fair(self) -> bool:
        return self._lines[""].strategy.fair

    @property
    def ask_costs(self) -> bool:
        """Whether one of them wants costs to be learned."""
        return any(line.strategy.name not in BLIND for line in self._lines.values())

    def by_deadline(self, service_class: str) -> bool:
        """Whether the engines are to go by when its requests' first tokens are late."""
        return self._line(service_class).strategy.order in ("deadline", "feasible", "on_time")

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        line = self._line(request.service_class)
        placement = line.strategy.place(request, workers)
        line.placed += 1
        return placement

    def in_force(self) -> list[InForce]:
        return [
            InForce(name, line.strategy.name, line.strategy.order, line.placed) for name, line in self._lines.items()
        ]

    def use(self, strategy: str, service_class: str = "") -> None:
        """From the next request on; what is placed stays where it is. Raises InvalidRequest."""
        if strategy not in STRATEGIES:
            raise InvalidRequest(
                f"strategy {strategy!r} is unknown; known: {', '.join(STRATEGIES)}", metadata={"field": "strategy"}
            )
        self.check(service_class)
        self._lines[service_class] = _Line(make_strategy(strategy, self._costs))
        if strategy not in BLIND:
            self._on_asked()

    def _line(self, service_class: str) -> _Line:
        return self._lines.get(service_class) or self._lines[""]

    def check(self, service_class: str) -> None:
        """Raises InvalidRequest for a class that the configuration does not have."""
        if service_class and service_class not in self._config.classes:
            known = ", ".join(self._config.classes) or "none (router.classes)"
            raise InvalidRequest(
                f"service_class {service_class!r} is unknown; known: {known}", metadata={"field": "service_class"}
            )


def ttft_target_s(config: RouterConfig, service_class: str = "") -> float:
    return _target_s(config, service_class, "ttft_target_ms")


def tpot_target_s(config: RouterConfig, service_class: str = "") -> float:
    return _target_s(config, service_class, "tpot_target_ms")


def _target_s(config: RouterConfig, service_class: str, key: str) -> float:
    own = getattr(config.classes[service_class], key) if service_class in config.classes else None
    return (getattr(config, key) if own is None else own) / 1e3 or math.inf
