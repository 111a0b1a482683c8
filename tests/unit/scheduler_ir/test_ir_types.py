from __future__ import annotations

import pytest

from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, IRNode, PlanNodeKind

DECODE = IRNode(0, PlanNodeKind.DECODE, "d", (), 0, 8)


def test_a_plan_finds_its_nodes() -> None:
    plan = ExecutionPlan("r/1", "r", "fifo", (DECODE,))
    assert plan.node(PlanNodeKind.DECODE) is DECODE
    assert plan.node(PlanNodeKind.PREFILL) is None


def test_a_node_may_depend_only_on_earlier_ones() -> None:
    with pytest.raises(ValueError, match="depends on unknown nodes"):
        ExecutionPlan("r/1", "r", "fifo", (IRNode(1, PlanNodeKind.DECODE, "d", (2,), 0, 1),))


def test_node_ids_are_unique() -> None:
    with pytest.raises(ValueError, match="used twice"):
        ExecutionPlan("r/1", "r", "fifo", (DECODE, DECODE))


@pytest.mark.parametrize(("start", "end"), [(3, 2), (-1, 2)])
def test_token_ranges_are_ranges(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        IRNode(0, PlanNodeKind.PREFILL, "p", (), start, end)
