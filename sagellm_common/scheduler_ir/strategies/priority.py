"""Placed as `fifo` does; inside the engines the larger priority goes first, and waiting raises it: nothing starves."""

from __future__ import annotations

from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES
from sagellm_common.scheduler_ir.strategies.fifo import Fifo


@STRATEGIES.register("priority")
class Priority(Fifo):
    name = "priority"
    order: Order = "aging"
