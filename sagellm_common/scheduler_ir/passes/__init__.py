"""Passes over an IRGraph, one idea each. A pass keeps tokens and dependencies, and done twice is done once."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph

Pass = Callable[[IRGraph, Facts], IRGraph]
