"""What every backend with collectives does (`CommBackendProtocol`, `CommGroup`)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest
import torch

from sagellm_common.comm_backend.backends import open_comm
from sagellm_common.comm_backend.backends.mock_group import LinkFaults
from sagellm_common.comm_backend.protocol import CommGroup, ReduceOp
from sagellm_common.comm_backend.tensor_calls import DTYPES, REDUCIBLE
from sagellm_common.core.errors import ConfigError, InvalidRequest, KvCorrupt, LayoutMismatch, PeerLost, SageError
from tests.support.comm_groups import BACKENDS, HOST, NUM_RANKS, TIMEOUT_S, Members, on_all, same

SHORT_S = 0.3
"""For calls that nobody answers."""


@pytest.fixture(params=BACKENDS)
async def members(request: pytest.FixtureRequest) -> AsyncIterator[Members]:
    members = Members(request.param)
    await members.start(NUM_RANKS)
    yield members
    await members.close()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- right answers ----

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (3, 5, 7), (1 << 20,)]


async def test_send_brings_every_dtype(members: Members) -> None:
    group = await members.group(0, 1)
    for dtype in DTYPES:
        tensor = members.tensor(5, 3, dtype=dtype, seed=1)
        into = await members.sent(group, tensor)
        assert (into.dtype, bits(into)) == (dtype, bits(tensor))


async def test_every_call_takes_any_shape(members: Members) -> None:
    group = await members.group()
    for shape in SHAPES:
        tensors = [members.tensor(*shape, seed=rank, rank=rank) for rank in range(3)]
        total = [sum(tensor.cpu() for tensor in tensors)]
        assert same([await members.sent(group, tensors[2], source=2, to=0)], [tensors[2]])
        for found in await on_all(group, "all_gather", tensors):
            assert same(found, tensors)
        copies = [tensor.clone() for tensor in tensors]
        assert await on_all(group, "broadcast", copies, 1) == [None] * 3
        assert same(copies, [tensors[1]] * 3)
        assert await on_all(group, "all_reduce", tensors) == [None] * 3
        assert same(tensors, total * 3)


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_all_reduce_over_dtypes_and_sizes(members: Members, size: int) -> None:
    group = await members.group(*range(size))
    reduced = {ReduceOp.SUM: lambda s: s.sum(0), ReduceOp.MAX: lambda s: s.amax(0), ReduceOp.MIN: lambda s: s.amin(0)}
    for op, reference in reduced.items():
        for dtype in REDUCIBLE:
            tensors = [members.tensor(11, dtype=dtype, seed=rank, rank=rank) for rank in range(size)]
            expected = reference(torch.stack([tensor.cpu().double() for tensor in tensors])).to(dtype)
            assert await on_all(group, "all_reduce", tensors, op) == [None] * size
            assert same(tensors, [expected] * size), (op, dtype)


async def test_all_reduce_leaves_the_same_bits_everywhere(members: Members) -> None:
    """However floats round: ranks that went on with different bits would drift apart."""
    group = await members.group()
    tensors = [torch.randn(1001, generator=torch.Generator().manual_seed(r)).to(members.device(r)) for r in range(3)]
    assert await on_all(group, "all_reduce", tensors) == [None] * 3
    assert bits(tensors[0]) == bits(tensors[1]) == bits(tensors[2])


@pytest.mark.parametrize("root", [0, 1, 2])
async def test_broadcast_from_any_root(members: Members, root: int) -> None:
    group = await members.group()
    tensors = [members.tensor(9, seed=rank, rank=rank) for rank in range(3)]
    expected = tensors[root].clone()
    assert await on_all(group, "broadcast", tensors, root) == [None] * 3
    assert same(tensors, [expected] * 3)


async def test_all_gather_of_ragged_tensors(members: Members) -> None:
    group = await members.group()
    shapes = [(5, 2), (0,), (1,)]
    tensors = [members.tensor(*shape, dtype=torch.int64, seed=n, rank=n) for n, shape in enumerate(shapes)]
    for found in await on_all(group, "all_gather", tensors):
        assert [tuple(part.shape) for part in found] == shapes
        assert same(found, tensors)


async def test_tensors_that_are_not_contiguous(members: Members) -> None:
    group = await members.group(0, 1)
    wide = [members.tensor(4, 6, seed=rank, rank=rank) for rank in range(2)]
    before = [tensor.clone() for tensor in wide]
    await asyncio.gather(
        group[0].send(wide[0][:, ::2], 1, timeout_s=TIMEOUT_S), group[1].recv(wide[1][:, ::2], 0, timeout_s=TIMEOUT_S)
    )
    assert same([wide[1][:, ::2], wide[1][:, 1::2]], [before[0][:, ::2], before[1][:, 1::2]])
    expected = wide[0].t().cpu() + wide[1].t().cpu()
    assert await on_all(group, "all_reduce", [tensor.t() for tensor in wide]) == [None] * 2
    assert same([tensor.t() for tensor in wide], [expected] * 2)


# ---- groups, order, concurrency ----


async def test_groups_form_of_any_members_at_any_time(members: Members) -> None:
    pair, all_three = await members.group(2, 0), await members.group()
    assert [g.rank for g in pair] == [0, 1] and [g.size for g in all_three] == [3, 3, 3]
    assert same([await members.sent(pair, members.tensor(3, seed=5))], [members.tensor(3, seed=5)])
    for one in pair:
        await one.close()
    again = await members.group(0, 2)
    assert same([await members.sent(again, members.tensor(3, seed=6))], [members.tensor(3, seed=6)])


async def test_messages_arrive_in_order(members: Members) -> None:
    group = await members.group(0, 1)
    intos = [torch.zeros(n % 5 + 1, dtype=torch.int64, device=members.device(1)) for n in range(20)]
    async with asyncio.TaskGroup() as calls:
        for n, into in enumerate(intos):
            calls.create_task(group[0].send(torch.full_like(into, n, device=members.device(0)), 1, timeout_s=TIMEOUT_S))
            calls.create_task(group[1].recv(into, 0, timeout_s=TIMEOUT_S))
    assert [set(into.tolist()) for into in intos] == [{n} for n in range(20)]


async def test_everything_at_once(members: Members) -> None:
    """Both directions between all, large enough to fill any buffer, beside collectives, in two groups."""
    num, groups = 1 << 19, [await members.group(), await members.group()]
    intos: dict[tuple[int, int, int], torch.Tensor] = {}
    totals = []
    async with asyncio.TaskGroup() as calls:
        for which, group in enumerate(groups):
            for a, b in [(a, b) for a in range(3) for b in range(3) if a != b]:
                intos[which, a, b] = into = torch.zeros(num, device=members.device(b))
                calls.create_task(group[a].send(members.tensor(num, seed=10 * a + b, rank=a), b, timeout_s=TIMEOUT_S))
                calls.create_task(group[b].recv(into, a, timeout_s=TIMEOUT_S))
            for member in group:
                for n in range(3):
                    totals.append((n, torch.full((7,), float(n), device=members.device(member.rank))))
                    calls.create_task(member.all_reduce(totals[-1][1], timeout_s=TIMEOUT_S))
    for (_, a, b), into in intos.items():
        assert same([into], [members.tensor(num, seed=10 * a + b)])
    assert all(total.tolist() == [3.0 * n] * 7 for n, total in totals)


# ---- what does not fit ----


async def is_broken(members: Members, group: list[CommGroup]) -> None:
    for outcome in await on_all(group, "all_gather", [members.tensor(1, rank=rank) for rank in range(3)]):
        assert isinstance(outcome, SageError), outcome


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((4,), (3,)), ((3,), (4,)), ((2, 3), (3, 2)), ((1 << 20,), (1,)), ((1,), (1 << 20,))],
    ids=["smaller", "larger", "other-shape", "much-smaller", "much-larger"],
)
async def test_sizes_that_do_not_fit_are_a_mismatch_on_both_sides(
    members: Members, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    group = await members.group(0, 1)
    outcomes = await asyncio.gather(
        group[0].send(members.tensor(*ours), 1, timeout_s=TIMEOUT_S),
        group[1].recv(members.tensor(*theirs, rank=1), 0, timeout_s=TIMEOUT_S),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [LayoutMismatch] * 2, outcomes
    assert "rank 0 called message of float32" in str(outcomes[0])
    with pytest.raises(PeerLost, match="broken"):
        await group[0].send(members.tensor(1), 1, timeout_s=TIMEOUT_S)


async def test_collectives_that_differ_are_a_mismatch_on_all(members: Members) -> None:
    tensors = [members.tensor(4, rank=rank) for rank in range(3)]
    tensor = tensors[1]
    for odd, other, *args in (
        ("all_reduce", members.tensor(5, rank=1)),
        ("all_reduce", tensor.double()),
        ("all_reduce", tensor, ReduceOp.MAX),
        ("all_gather", tensor),
        ("broadcast", tensor, 2),
    ):
        group = await members.group()
        outcomes = await asyncio.gather(
            group[0].all_reduce(tensors[0], timeout_s=TIMEOUT_S),
            getattr(group[1], odd)(other, *args, timeout_s=TIMEOUT_S),
            group[2].all_reduce(tensors[2], timeout_s=TIMEOUT_S),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [LayoutMismatch] * 3, outcomes


async def test_what_is_wrong_from_the_start_leaves_the_group_whole(members: Members) -> None:
    group = await members.group(0, 1)
    one = members.tensor(1)
    for call in (
        lambda: group[0].send(one, 0, timeout_s=TIMEOUT_S),
        lambda: group[0].send(one, 2, timeout_s=TIMEOUT_S),
        lambda: group[0].recv(one, -1, timeout_s=TIMEOUT_S),
        lambda: group[0].broadcast(one, 2, timeout_s=TIMEOUT_S),
        lambda: group[0].all_reduce(one.bool(), timeout_s=TIMEOUT_S),
        lambda: group[0].send(one.to(torch.complex64), 1, timeout_s=TIMEOUT_S),
        lambda: group[0].send(torch.empty(1, device="meta"), 1, timeout_s=TIMEOUT_S),
    ):
        with pytest.raises(InvalidRequest):
            await call()
    assert same([await members.sent(group, members.tensor(1, seed=3))], [members.tensor(1, seed=3)])


async def test_a_group_needs_its_own_address_once(members: Members) -> None:
    ours, other = members.ends[0].address, members.ends[1].address
    for wrong in ([other], [], [ours, ours]):
        with pytest.raises(InvalidRequest, match="members"):
            await members.ends[0].join("g", wrong, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("name", ["mooncake", "rdma", "shm"])
def test_byte_paths_without_collectives_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' has none, .* use gloo or nccl or tcp"):
        open_comm(name, HOST, 0)


# ---- peers that are slow, leave, or die ----


async def test_a_slow_member_is_waited_for(members: Members) -> None:
    group = await members.group(0, 1)
    into = members.tensor(2, rank=1)
    receiving = asyncio.create_task(group[1].recv(into, 0, timeout_s=TIMEOUT_S))
    done, _ = await asyncio.wait([receiving], timeout=0.05)
    assert not done
    await group[0].send(members.tensor(2, seed=4), 1, timeout_s=TIMEOUT_S)
    await receiving
    assert same([into], [members.tensor(2, seed=4)])


@pytest.mark.parametrize("call", ["send", "recv", "broadcast", "all_reduce", "all_gather"])
async def test_a_silent_member_is_lost_at_the_deadline(members: Members, call: str) -> None:
    group = await members.group(0, 1)
    args = {"send": (1,), "recv": (1,), "broadcast": (1,), "all_reduce": (), "all_gather": ()}[call]
    tensor = members.tensor(1 << 16)
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(PeerLost):
            await getattr(group[0], call)(tensor, *args, timeout_s=SHORT_S)
    with pytest.raises(PeerLost, match="broken"):
        await group[0].all_gather(tensor, timeout_s=TIMEOUT_S)


async def test_a_member_that_never_comes(members: Members) -> None:
    addresses = [end.address for end in members.ends[:2]]
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(PeerLost):
            await members.ends[0].join("lonely", addresses, timeout_s=SHORT_S)


async def test_a_member_that_leaves_ends_the_waits_of_the_others(members: Members) -> None:
    group = await members.group()
    waiting = [
        asyncio.create_task(group[0].recv(members.tensor(8), 2, timeout_s=60.0)),
        asyncio.create_task(group[1].all_reduce(members.tensor(8, rank=1), timeout_s=60.0)),
    ]
    await asyncio.wait(waiting, timeout=0.05)
    await group[2].close()
    gc.collect()  # what torch has of it
    async with asyncio.timeout(10):
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, PeerLost), outcome
    await is_broken(members, group)


@pytest.mark.parametrize("call", ["recv", "broadcast", "all_reduce"])
async def test_nothing_is_written_after_a_cancellation(members: Members, call: str) -> None:
    group = await members.group(0, 1)
    into, args = torch.zeros(64, device=members.device(0)), {"recv": (1,), "broadcast": (1,), "all_reduce": ()}[call]
    task = asyncio.create_task(getattr(group[0], call)(into, *args, timeout_s=1.0))
    await asyncio.wait([task], timeout=0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    late = torch.ones(64, device=members.device(1))
    if call == "recv":
        other = group[1].send(late, 0, timeout_s=SHORT_S)
    else:
        other = getattr(group[1], call)(late, *args, timeout_s=SHORT_S)
    (outcome,) = await asyncio.gather(other, return_exceptions=True)
    assert outcome is None or isinstance(outcome, PeerLost)
    assert not into.any()
    with pytest.raises(PeerLost, match="broken: CancelledError"):
        await group[0].all_gather(into, timeout_s=TIMEOUT_S)


# ---- the mock's faults are the contract's errors ----


@pytest.mark.parametrize(
    ("faults", "errors"),
    [
        (LinkFaults(loss=1.0), (PeerLost,)),
        (LinkFaults(duplicate=1.0), (PeerLost, LayoutMismatch)),
        (LinkFaults(reorder=1.0), (PeerLost,)),
        (LinkFaults(corrupt=1.0), (KvCorrupt, PeerLost)),
        *((LinkFaults(s, 0.02, 0.02, 0.02, 0.02, 0.001), (PeerLost, KvCorrupt, LayoutMismatch)) for s in range(12)),
    ],
)
async def test_faults_of_links_are_noticed(faults: LinkFaults, errors: tuple[type[Exception], ...]) -> None:
    """Right bytes or an error, never wrong bytes."""
    members = Members("mock")
    await members.start(NUM_RANKS)
    group = await members.group()
    members.net.go_wrong(faults)
    failed = False
    for n in range(30):
        tensors = [members.tensor(33, seed=3 * n + rank) for rank in range(3)]
        expected = sum(tensors)
        outcomes = await on_all(group, "all_reduce", tensors, timeout_s=SHORT_S)
        for tensor, outcome in zip(tensors, outcomes, strict=True):
            assert isinstance(outcome, errors) if outcome is not None else same([tensor], [expected])
        if failed := any(outcome is not None for outcome in outcomes):
            break
    assert failed
    await members.close()


async def test_a_link_that_is_only_slow_is_right() -> None:
    members = Members("mock")
    await members.start(NUM_RANKS)
    group = await members.group()
    members.net.go_wrong(LinkFaults(max_delay_s=0.005))
    tensors = [members.tensor(33, seed=rank) for rank in range(3)]
    expected = sum(tensors)
    assert await on_all(group, "all_reduce", tensors) == [None] * 3
    assert same(tensors, [expected] * 3)
    await members.close()
