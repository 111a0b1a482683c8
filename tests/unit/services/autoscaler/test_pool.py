"""Workers that take either role: who gets which, and what the autoscaler does with it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry

from sagellm_common.client.router import RoleChange, WorkerView
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, PeerLost, SageError, WrongRole
from sagellm_common.core.types import KvStats, WorkerRecord, WorkerRole
from services.autoscaler.demand import Counters
from services.autoscaler.loop import Autoscaler
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.observe import Cluster, serves
from services.autoscaler.orchestrator import DryRun, Orchestrator, Workload
from services.autoscaler.planner import Planner
from services.autoscaler.pool import Pool
from tests.unit.services.autoscaler.test_planner import LIMITS, TARGETS, learned

P, D, BOTH = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH
CONFIG = AutoscalerConfig(interval_s=10, startup_s=60, scale_down_after_s=60, cooldown_s=20, pool_target="fixed")


class World:
    """Workers by id, a router that changes their roles, and the size of their workload."""

    def __init__(self, **roles: WorkerRole) -> None:
        self.roles = roles
        self.requests = dict.fromkeys(roles, 0)
        self.refuses: dict[str, SageError] = {}
        self.changed: list[tuple[str, WorkerRole]] = []
        self.size = len(roles)
        self.total = Counters()

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        return tuple(
            WorkerView(WorkerRecord(id, role, "", "", f"{id}-1", 1), KvStats(0, 0, 0, 0), self.requests[id], 0, 0, 0)
            for id, role in self.roles.items()
        )

    def count(self, role: WorkerRole) -> int:
        return sum(serves(worker, role) for worker in self.workers)

    # ---- as a router ----

    async def set_role(self, worker_id: str, role: WorkerRole, *, grace_s: float | None = None) -> RoleChange:
        if worker_id in self.refuses:
            raise self.refuses[worker_id]
        before, self.roles[worker_id] = self.roles[worker_id], role
        self.changed.append((worker_id, role))
        (record,) = (worker.record for worker in self.workers if worker.record.worker_id == worker_id)
        return RoleChange(record, before, self.requests[worker_id])

    async def look(self) -> Cluster:
        counters: Mapping[str, Counters] = {"router": self.total}
        return Cluster(counters, self.count(P), self.count(D), LIMITS, self.workers)

    # ---- as an API server ----

    async def replicas(self, phase: Workload) -> int:
        assert phase == "pool"
        return self.size

    async def scale(self, phase: Workload, replicas: int) -> None:
        assert phase == "pool"
        self.size = replicas


async def settled(pool: Pool, world: World) -> str:
    pool.look(world.workers)
    return await pool.settle()


async def test_the_least_busy_worker_changes_its_role() -> None:
    world = World(p=P, d1=D, d2=D, d3=D)
    world.requests.update(d1=4, d2=1, d3=2)
    pool = Pool(world, None)
    assert await settled(pool, world) == "", "as it is, it is as asked"
    pool.flip(1)
    assert await settled(pool, world) == "d2 from decode to prefill, 1 requests go on there"
    assert (await pool.replicas("prefill"), await pool.replicas("decode")) == (2, 2)
    pool.flip(-1)
    world.requests["p"] = 3
    assert await settled(pool, world) == "d2 from prefill to decode, 1 requests go on there"


async def test_who_comes_gets_the_role_that_is_lacking() -> None:
    world = World(p=P, d=D)
    pool = Pool(world, world)
    await settled(pool, world)
    await pool.scale("prefill", 3)
    assert world.size == 4
    world.roles |= {"new1": BOTH, "new2": BOTH}
    world.requests |= {"new1": 0, "new2": 0}
    await settled(pool, world)
    assert (world.roles["new1"], world.roles["new2"]) == (P, P)
    world.roles["p"] = BOTH  # restarted
    await settled(pool, world)
    assert world.roles["p"] is P
    world.roles["new1"] = D  # by hand
    await settled(pool, world)
    assert (world.count(P), world.count(D)) == (3, 1)


async def test_while_a_worker_starts_nobody_changes_in_its_place() -> None:
    world = World(p=P, d=D)
    pool = Pool(world, world)
    await settled(pool, world)
    await pool.scale("decode", 3)
    assert await settled(pool, world) == ""
    assert (await pool.replicas("prefill"), await pool.replicas("decode")) == (1, 3)


async def test_a_worker_that_cannot_change_is_left_alone_and_one_out_of_reach_is_asked_again() -> None:
    world = World(p=P, d1=D, d2=D)
    world.refuses["d1"] = WrongRole("its process serves decode")
    pool = Pool(world, None)
    await settled(pool, world)
    pool.flip(1)
    assert await settled(pool, world) == "d1 cannot become prefill: its process serves decode"
    assert await pool.replicas("prefill") == 1, "it is not asked for until it is wanted again"
    world.refuses["d2"] = PeerLost("gone")
    pool.flip(1)
    assert "d2 is not prefill yet" in await settled(pool, world)
    del world.refuses["d2"]
    await settled(pool, world)
    assert world.roles == {"p": P, "d1": D, "d2": P}


async def test_one_worker_alone_stays_both() -> None:
    world = World(w=BOTH)
    assert await settled(Pool(world, None), world) == ""
    with pytest.raises(ConfigError, match="there are no other workers"):
        await Pool(world, None).scale("decode", 2)


# ---- by the autoscaler ----


class Lab:
    """An autoscaler over a world, that looks every ten seconds."""

    def __init__(self, world: World, config: AutoscalerConfig = CONFIG, *, dry: bool = False) -> None:
        self.world, self.clock = world, ManualClock()
        pool: Orchestrator = Pool(world, None if config.pool_target == "fixed" else world)
        costs = learned()
        planner = Planner(config, lambda: costs, TARGETS, LIMITS, flips=True)
        metrics = AutoscalerMetrics(CollectorRegistry())
        self.scaler = Autoscaler(config, world, planner, DryRun(pool) if dry else pool, metrics, self.clock)

    async def after(self, requests: int, prompt: int = 1000, output: int = 100) -> str:
        self.clock.advance(10)
        self.world.total += Counters(requests, 0, requests * prompt, 0, requests * output)
        step = await self.scaler.step()
        return step.done if step else ""


async def test_among_a_fixed_number_of_workers_roles_follow_the_load() -> None:
    world = World(**{f"w{n}": P if n < 3 else D for n in range(6)})
    lab = Lab(world)
    await lab.after(0)
    await lab.after(400, prompt=1600, output=2)
    assert (world.count(P), world.count(D)) == (5, 1), "long prompts, short answers"
    assert "no change of roles: cooling down" in await lab.after(400, prompt=10, output=3000)
    for _ in range(3):
        await lab.after(400, prompt=10, output=3000)
    assert world.count(D) > 3
    assert world.size == 6
    for _ in range(12):
        assert await lab.after(1, prompt=10, output=3) == "nothing: it is as it should be", "nobody lacks any"


async def test_a_change_of_roles_comes_before_a_new_worker_that_takes_longer() -> None:
    config = replace_config(max_prefill=20, max_decode=20)
    world = World(**{f"w{n}": P if n < 2 else D for n in range(8)})
    lab = Lab(world, config)
    await lab.after(0)
    done = await lab.after(360, output=5)
    assert lab.scaler.steps[-1].decision.flips == 4
    assert (world.count(P), world.size) == (6, 8)
    assert "decode stays at 2: roles are changing" in done


async def test_where_a_new_worker_is_sooner_it_is_started() -> None:
    config = replace_config(startup_s=0.0, max_prefill=20, max_decode=20)
    world = World(**{f"w{n}": P if n < 2 else D for n in range(8)})
    world.requests = dict.fromkeys(world.requests, 3)
    lab = Lab(world, config)
    await lab.after(0)
    done = await lab.after(360, output=5)
    assert lab.scaler.steps[-1].decision.flips == 0
    assert "a new worker serves after 0 s" in lab.scaler.steps[-1].decision.reason
    assert world.size == 12 and "prefill from 2 to 6; decode stays at 6: the other phase's come first" in done


async def test_a_dry_run_changes_no_role() -> None:
    world = World(p=P, d1=D, d2=D, d3=D)
    lab = Lab(world, dry=True)
    await lab.after(0)
    await lab.after(400, prompt=1600, output=2)
    assert lab.scaler.steps[-1].decision.flips == 2
    assert world.changed == []


def replace_config(**changes: object) -> AutoscalerConfig:
    return AutoscalerConfig(**{**CONFIG.model_dump(), "pool_target": "statefulset/w", **changes})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["pool_target=fixed", "decode_target=deployment/d"],
            "pool_target goes without prefill_target and decode_target",
        ),
        (["pool_target=some"], "must be deployment/NAME or statefulset/NAME"),
        (["decode_target=fixed"], "must be deployment/NAME or statefulset/NAME"),
    ],
)
def test_a_target_that_cannot_be_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, {}, [f"autoscaler.{setting}" for setting in settings])
