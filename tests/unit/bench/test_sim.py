"""The simulator against what can be computed by hand."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.sim.__main__ import main, strategy_maker
from bench.sim.clock import VirtualClock
from bench.sim.cluster import SimCluster, Slo
from bench.sim.kv import SimKv
from bench.sim.network import Network
from bench.sim.peers import PEERS
from bench.sim.profile import PROFILES, Profile, load_profile
from bench.sim.report import attainment, goodput, meets, summary
from bench.sim.traces import SimRequest, generated, load_trace
from bench.sim.workers import DecodeSim, Job
from sagellm_common.core.errors import ConfigError
from sagellm_common.scheduler_ir.engine_policy import SequenceView
from sagellm_common.scheduler_ir.strategies import STRATEGIES

PROFILE = Profile(
    prefill=(0.01, 1e-4, 1e-9),
    decode=(0.01, 1e-6, 1e-3),
    link_latency_s=0.001,
    link_bytes_per_s=1e9,
    kv_bytes_per_token=1000,
    num_layers=10,
    kv_tokens=100_000,
    max_batch=4,
    prefill_chunk_tokens=1000,
)
SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def cluster(strategy: str = "fifo", prefill: int = 1, decode: int = 1) -> SimCluster:
    return SimCluster(PROFILE, prefill, decode, strategy_maker(strategy), SLO, block_tokens=100)


def step_by_step(lengths: list[tuple[int, int]], arrivals_s: list[float]) -> list[float]:
    """End times of (prompt, output) sequences in continuous batches, one step after the other."""
    a, b, c = PROFILE.decode
    waiting = sorted(range(len(lengths)), key=lambda i: (arrivals_s[i], i))
    running: dict[int, list[int]] = {}
    ends, now_s = [math.nan] * len(lengths), 0.0
    while waiting or running:
        if not running:
            now_s = max(now_s, arrivals_s[waiting[0]])
        while waiting and arrivals_s[waiting[0]] <= now_s + 1e-12 and len(running) < PROFILE.max_batch:
            i = waiting.pop(0)
            running[i] = [lengths[i][0] + 1, lengths[i][1] - 1]
        now_s += a + b * sum(context for context, _ in running.values()) + c * len(running)
        for i in list(running):
            running[i][0] += 1
            running[i][1] -= 1
            if running[i][1] == 0:
                ends[i] = now_s
                del running[i]
    return ends


@pytest.mark.parametrize("arrivals_s", [[0.0] * 6, [0.0, 0.005, 0.3, 0.31, 0.32, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
def test_decoding_in_closed_form_is_decoding_step_by_step(arrivals_s: list[float]) -> None:
    lengths = [(100, 20), (50, 3), (2000, 40), (10, 11), (10, 2), (700, 30)]
    clock = VirtualClock()
    worker = DecodeSim("d", clock, PROFILE, SimKv(1000, 100, "lru"))
    ends = [math.nan] * len(lengths)

    def ended(i: int) -> None:
        ends[i] = clock.now_s

    for i, (prompt, output) in enumerate(lengths):
        job = Job(SimRequest(arrivals_s[i], prompt, output), SequenceView(str(i), i))
        clock.at(arrivals_s[i], lambda job=job, i=i: worker.submit(job, lambda: ended(i)))  # type: ignore[misc]
    clock.run()
    assert ends == pytest.approx(step_by_step(lengths, arrivals_s), abs=1e-9)


def test_one_request_takes_what_the_formulas_say() -> None:
    outcome = cluster().run([SimRequest(0.0, 1500, 11)])
    (job,) = outcome.jobs
    a, b, c = PROFILE.prefill
    assert job.first_token_s == pytest.approx(2 * a + b * 1500 + c * 1500**2)  # two chunks
    num_bytes, last_step_s = 1500 * 1000, a + b * 500 + c * (1500**2 - 1000**2)
    left = num_bytes - min(num_bytes * 0.9, last_step_s * 1e9)
    transfer_s = 0.001 + left / 1e9
    join_s = a + b + c * (1501**2 - 1500**2)  # the KV of the first token, and the second token from it
    d, e, f = PROFILE.decode
    steps_s = sum(d + e * (1502 + step) + f for step in range(9))
    assert job.end_s == pytest.approx(job.first_token_s + transfer_s + join_s + steps_s)


def test_who_joins_together_joins_in_one_step_and_the_others_wait_for_it() -> None:
    clock, ends = VirtualClock(), dict[str, float]()
    worker = DecodeSim("d", clock, PROFILE, SimKv(1000, 100, "lru"))

    def submit(name: str, output_tokens: int, prefill_worker: str) -> None:
        job = Job(SimRequest(0.0, 100, output_tokens), SequenceView(name, 0), prefill_worker=prefill_worker)
        worker.submit(job, lambda: ends.setdefault(name, clock.now_s))

    submit("local", 5, "")
    clock.at(0.001, lambda: submit("first", 3, "p"))
    clock.at(0.002, lambda: submit("second", 3, "p"))
    clock.run()
    (a, b, c), (d, e, f) = PROFILE.prefill, PROFILE.decode
    alone_s, join_s = d + e * 101 + f, a + 2 * (b + c * (101**2 - 100**2))
    together_s = d + e * (102 + 2 * 102) + 3 * f
    joined_s = alone_s + join_s + together_s
    assert ends["first"] == ends["second"] == pytest.approx(joined_s)
    assert ends["local"] == pytest.approx(joined_s + sum(d + e * context + f for context in (103, 104)))


def test_larger_batches_may_cost_otherwise_and_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = replace(PROFILE, larger_batches=((3, (0.5, 0.0, 0.0)),), overhead_s=0.25)
    assert [profile.decode_costs(batch) for batch in (1, 2, 3, 9)] == [PROFILE.decode] * 2 + [(0.5, 0.0, 0.0)] * 2
    profile.save(tmp_path / "p.json")
    assert load_profile(str(tmp_path / "p.json")) == profile
    for text in ("", "{}", "[1]", json.dumps({**asdict(profile), "decode": [1]})):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ConfigError, match="broken.json"):
            load_profile(str(tmp_path / "broken.json"))
    make = strategy_maker("fifo")
    jobs = {
        p.overhead_s: SimCluster(p, 1, 1, make, SLO).run([SimRequest(1.0, 100, 2)]).jobs for p in (PROFILE, profile)
    }
    assert jobs[0.25][0].first_token_s == pytest.approx(jobs[0.0][0].first_token_s + 0.25)


def test_prompts_that_fit_are_computed_together_and_a_long_one_alone() -> None:
    outcome = cluster(decode=2).run([SimRequest(0.0, tokens, 2) for tokens in (10, 300, 600, 200, 1500, 50)])
    a, b, c = PROFILE.prefill

    def step_s(*chunks: tuple[int, int]) -> float:
        return a + sum(b * (end - start) + c * (end**2 - start**2) for start, end in chunks)

    first, together, rest = step_s((0, 10)), step_s((0, 300), (0, 600)), step_s((0, 200))
    long = step_s((0, 1000)) + step_s((1000, 1500))
    ends = [first, *2 * [first + together], first + together + rest, first + together + rest + long]
    ends.append(ends[-1] + step_s((0, 50)))
    assert [job.first_token_s for job in outcome.jobs] == pytest.approx(ends)


def test_transfers_through_one_card_share_it() -> None:
    clock = VirtualClock()
    network, ends = Network(clock, bytes_per_s=100.0, latency_s=0.0), dict[str, float]()

    def note(name: str) -> None:
        ends[name] = clock.now_s

    network.send("a", "x", 100.0, lambda: note("first"))
    network.send("a", "y", 100.0, lambda: note("second"))
    network.send("b", "z", 100.0, lambda: note("apart"))
    clock.run()
    assert ends == pytest.approx({"first": 2.0, "second": 2.0, "apart": 1.0})


def test_a_prompt_is_found_again_where_it_was_computed() -> None:
    blocks = tuple(range(10))
    requests = [SimRequest(0.0, 1000, 2, blocks), SimRequest(5.0, 1000, 2, blocks), SimRequest(10.0, 1000, 2, (77,))]
    found = summary(cluster(prefill=2, decode=2).run(requests), SLO, 4)
    assert found["kv_hit_rate"] == pytest.approx(999 / 3000)
    assert found["completed"] == 3


def test_who_cannot_fit_is_rejected_and_counts_as_a_miss() -> None:
    outcome = cluster().run([SimRequest(0.0, 100, 2), SimRequest(0.0, 200_000, 2)])
    assert [job.rejected for job in outcome.jobs] == ["", "CONTEXT_TOO_LONG"]
    assert attainment(outcome, SLO) == 0.5
    assert summary(outcome, SLO, 2)["rejected"] == 1


def test_memory_that_is_full_is_waited_for() -> None:
    outcome = cluster().run([SimRequest(0.0, 60_000, 5), SimRequest(0.0, 60_000, 5)])
    first, second = outcome.jobs
    assert second.first_token_s > first.end_s


def test_without_prefill_workers_the_decode_workers_compute_the_prompts() -> None:
    outcome = cluster(prefill=0).run([SimRequest(0.0, 500, 50), SimRequest(0.02, 500, 50)])
    assert all(not job.prefill_worker and not math.isnan(job.end_s) for job in outcome.jobs)
    assert outcome.transferred_bytes == 0


@pytest.mark.parametrize("strategy", [*STRATEGIES, *PEERS])
def test_every_strategy_serves_everything_twice_the_same(strategy: str) -> None:
    requests = generated(300, 20.0, seed=1, prompt_tokens=800, output_tokens=20, burstiness=4, shared_prefixes=5)
    runs = [cluster(strategy, 3, 2).run(requests) for _ in range(2)]
    assert [job.end_s for job in runs[0].jobs] == [job.end_s for job in runs[1].jobs]
    assert not any(math.isnan(job.end_s) for job in runs[0].jobs)


def test_more_is_in_time_when_those_go_first_of_whom_most_can_be() -> None:
    """One long prompt in front of many short ones: first come, first served loses them all."""
    learned = [SimRequest(float(i), 100 * i, 2) for i in range(1, 9)]
    rush = [SimRequest(20.0, 20_000, 2), *(SimRequest(20.0 + 0.001 * i, 500, 2) for i in range(1, 9))]
    for strategy, in_time in (("fifo", 0), ("hybrid", 8)):
        jobs = cluster(strategy).run([*learned, *rush]).jobs[len(learned) :]
        assert sum(meets(job, SLO) for job in jobs) == in_time


def test_goodput_is_the_rate_at_which_nine_of_ten_are_in_time() -> None:
    """A prompt takes 0.13 s and none waits: up to 1/0.13 requests a second, evenly spaced, all are in time."""
    slo = Slo(ttft_s=0.2, tpot_s=1.0)
    requests = [SimRequest(float(i), 1000, 1) for i in range(200)]
    found = goodput(requests, lambda rs: SimCluster(PROFILE, 1, 1, strategy_maker("fifo"), slo).run(rs), slo)
    assert found == pytest.approx(1 / 0.111, rel=0.05)


def test_a_run_that_may_miss_no_more_ends_there() -> None:
    """Twenty long prompts at once, then many: the third that is late ends it."""
    requests = [SimRequest(0.001 * i, 5000, 2) for i in range(20)] + [SimRequest(1000.0 + i, 10, 2) for i in range(100)]
    make = strategy_maker("fifo")
    whole = SimCluster(PROFILE, 1, 1, make, SLO).run(requests)
    assert not whole.gave_up and len(whole.jobs) == 120
    misses = sum(not meets(job, SLO) for job in whole.jobs)
    enough = SimCluster(PROFILE, 1, 1, make, SLO, max_misses=misses).run(requests)
    assert not enough.gave_up and len(enough.jobs) == 120
    few = SimCluster(PROFILE, 1, 1, make, SLO, max_misses=2).run(requests)
    assert few.gave_up and len(few.jobs) == 20
    assert attainment(few, SLO) < 0.9


def test_noise_is_drawn_and_the_same_seed_draws_the_same() -> None:
    noisy = replace(PROFILE, prefill_noise=(0.5, 1.0, 3.0))
    requests = [SimRequest(float(i), 500, 2) for i in range(30)]

    def took(seed: int) -> list[float]:
        jobs = SimCluster(noisy, 1, 1, strategy_maker("fifo"), SLO, seed=seed).run(requests).jobs
        return [job.first_token_s - job.request.arrival_s for job in jobs]

    a, b, c = PROFILE.prefill
    step_s = a + b * 500 + c * 500**2
    assert took(1) == took(1) != took(2)
    assert {round(s / step_s, 6) for s in took(1)} == {0.5, 1.0, 3.0}


def test_of_a_thousand_workers_the_idle_and_the_holders_are_asked() -> None:
    blocks = tuple(range(20))
    requests = [SimRequest(0.0, 2000, 2, blocks), *(SimRequest(1.0 + i / 1e3, 900, 40) for i in range(150))]
    again = SimRequest(9.0, 2000, 2, blocks)
    jobs = cluster("fifo", prefill=60, decode=60).run([*requests, again]).jobs
    assert len({job.prefill_worker for job in jobs[1:151]}) == 60
    assert (jobs[-1].prefill_worker, jobs[-1].prefill_hit_tokens) == (jobs[0].prefill_worker, 1999)


def test_traces_are_read_and_broken_lines_named(tmp_path: Path) -> None:
    mooncake, azure = tmp_path / "m.jsonl", tmp_path / "a.csv"
    mooncake.write_text('{"timestamp": 3000, "input_length": 600, "output_length": 0, "hash_ids": [1, 2]}\n\n')
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47,1,2\n"
    )
    assert load_trace(mooncake, "mooncake") == [SimRequest(0.0, 600, 1, (1, 2))]
    first, second = load_trace(azure, "azure")
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(0.31941)
    with pytest.raises(ConfigError, match="absent"):
        load_trace(tmp_path / "absent", "azure")


def test_traces_may_be_gzipped_unsorted_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    packed, azure = tmp_path / "m.jsonl.gz", tmp_path / "a.csv"
    rows = [{"timestamp": at, "input_length": 5, "output_length": 1} for at in (2000, 1000)]
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [request.arrival_s for request in load_trace(packed, "mooncake")] == [0.0, 1.0]
    azure.write_text(
        "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n\r\n"
        "2024-05-10 00:00:01.5+00:00,3,4\r\n2024-05-10 00:00:00,1,0\r\n"
    )
    assert load_trace(azure, "azure") == [SimRequest(0.0, 1, 1), SimRequest(1.5, 3, 4)]
    packed.write_bytes(packed.read_bytes()[:-6])
    with pytest.raises(ConfigError, match="end"):
        load_trace(packed, "mooncake")


ROW = {"timestamp": 1, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**ROW, "timestamp": math.nan}, "2: timestamp nan: must be a finite number"),
        ({**ROW, "input_length": 0}, "2: input_length 0: must be at least 1"),
        ({**ROW, "input_length": 1.5}, "2: input_length 1.5: must be a whole number"),
        ({**ROW, "output_length": -3}, "2: output_length -3: must be at least 0"),
        ({**ROW, "output_length": None}, "2: output_length is missing"),
        ({**ROW, "hash_ids": "12"}, "2: hash_ids '12': must be a list of integers"),
        ({**ROW, "hash_ids": list(range(40))}, "smaller ones"),
        ([1], r"2: \[1\] is no JSON object"),
    ],
)
def test_a_broken_line_of_a_mooncake_trace_is_named(row: object, named: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(f"\n{json.dumps(row)}\n")
    with pytest.raises(ConfigError, match=f"t.jsonl:.*{named}.*the mooncake format"):
        load_trace(trace, "mooncake")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("noon,3,4", "3: TIMESTAMP 'noon'"),
        ("2023-11-16 18:15:46,0,4", "3: ContextTokens '0': must be at least 1"),
        ("2023-11-16 18:15:46,3,x", "3: GeneratedTokens 'x': must be a whole number"),
        ("2023-11-16 18:15:46,3", "3: GeneratedTokens is missing"),
    ],
)
def test_a_broken_line_of_an_azure_trace_is_named(line: str, named: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n{line}\n")
    with pytest.raises(ConfigError, match=f"t.csv:{named}.*the azure format"):
        load_trace(trace, "azure")


@pytest.mark.parametrize(
    ("text", "form"), [("a,b\n1,2\n", "azure"), ("", "azure"), ("", "mooncake"), ("{", "mooncake")]
)
def test_a_file_that_is_no_trace_is_named(text: str, form: str, tmp_path: Path) -> None:
    trace = tmp_path / "t"
    trace.write_text(text)
    with pytest.raises(ConfigError, match="t:1: there is no column TIMESTAMP|no request in it|Expecting property name"):
        load_trace(trace, form)


def test_the_command_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
    rows = [{"timestamp": 100 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i]} for i in range(1, 20)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("sys.argv", ["simulate", "--trace", str(trace), "--json", str(out), "--slo-ttft-ms", "500"])
    assert main() == 0
    found = json.loads(out.read_text())
    assert found.keys() >= {"goodput_rps", "offered", "completed", "rejected", "kv_hit_rate", "gpu_seconds"}
    assert found["offered"] == found["completed"] == 19
    assert found["ttft_ms"].keys() == {"p50", "p95", "p99"} == found["tpot_ms"].keys()
    assert found["goodput_rps"] > 10
    assert "goodput_rps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--strategy", "psychic"], "psychic"),
        (["--profile", "abacus"], "abacus"),
        (["--decode", "0"], "--decode"),
        (["--slo-ttft-ms", "nan"], "--slo-ttft-ms"),
        (["--rate-scale", "-1"], "--rate-scale"),
        (["--format", "azure"], "--trace"),
        (["--eviction", "none"], "none"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulate", "--format", "poisson", "--requests", "5", *options])
    assert main() == 2
    assert named in capsys.readouterr().err


def test_profiles_follow_the_roofline() -> None:
    eight = PROFILES.get("h200-8b")
    assert eight.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert eight.prefill[1] == pytest.approx(2 * 8e9 / (0.5 * 989e12))
    assert eight.decode[0] == pytest.approx(2e-3 + 16e9 / (0.7 * 4.8e12))
