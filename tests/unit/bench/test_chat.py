"""`sagellm bench chat`: what it asks, whom it kills, how it judges; and (long) a small run of the real thing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.benchmarks.chat.__main__ import main, markdown, plot, verdict
from bench.benchmarks.chat.measure import LONE, OFF, ON, WORKERS, Answer, Measured, due, percentile, rows
from bench.benchmarks.chat.workload import Conversation, users
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.types import GenerationSummary


def test_a_seed_decides_the_conversations() -> None:
    assert users(20, 4, 7) == users(20, 4, 7) != users(20, 4, 8)
    people = users(20, 4, 7)
    assert {len(user.questions) for user in people} == {4}
    assert len({user.system for user in people}) == 4, "users share the beginning of their prompts"


def test_a_turn_continues_the_tokens_of_the_one_before(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama)
    (user,) = users(1, 3, 0)
    talk, seen = Conversation(user, tokenizer), []
    for turn in range(3):
        prompt = talk.ask()
        assert prompt[: len(seen)] == seen
        talk.answered([40 + turn, 41])
        seen = [*prompt, 40 + turn, 41]
    # As the template renders the whole of it.
    messages = [{"role": "system", "content": user.system}]
    for turn, question in enumerate(user.questions):
        messages.append({"role": "user", "content": question})
        if turn < 2:
            messages.append({"role": "assistant", "content": tokenizer.decode([40 + turn, 41])})
    assert tokenizer.decode(prompt, skip_special_tokens=False) == tokenizer.render_chat(messages)


@pytest.mark.parametrize("turns", [2, 3, 4, 9])
def test_each_part_is_killed_once_and_none_in_the_first_turn(turns: int) -> None:
    killed = [victim for turn in range(turns) for victim in due(turn, turns)]
    assert sorted(killed) == sorted([*WORKERS, *LONE])
    assert due(0, turns) == []


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.95)] == [1.0, 2.0, 3.0]


def answers(tokens: tuple[int, ...], cached: int) -> list[list[Answer]]:
    summary = GenerationSummary(prompt_tokens=100, cached_tokens=cached, store_tokens=cached // 2)
    return [[Answer(turn, 10.0 * (turn + 1), tokens, summary) for turn in range(2)] for _ in range(3)]


def test_rows_table_plot_and_verdict(tmp_path: Path) -> None:
    found = Measured({ON: answers((1, 2), 80), OFF: answers((1, 2), 0)})
    made = rows(found)
    assert [(row["turn"], row["stack"], row["hit_rate"], row["store_rate"]) for row in made] == [
        *[(1, "off", 0.0, 0.0), (1, "on", 0.8, 0.4)],
        *[(2, "off", 0.0, 0.0), (2, "on", 0.8, 0.4)],
    ]
    assert "80.0%" in markdown(made, "title")
    plot(made, "title", tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size
    assert verdict(found).startswith("all 6 answers")
    found.answers[OFF][1][1] = Answer(1, 1.0, (1, 3), GenerationSummary(prompt_tokens=100))
    assert found.differing == [(1, 1)]
    assert verdict(found).endswith("user 1 turn 2")


@pytest.mark.parametrize("wrong", [["--users", "0"], ["--turns", "1", "--kill"]])
def test_too_few(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(wrong)
    assert raised.value.code == 2
    assert "must be at least" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("SAGELLM_TEST_LONG"), reason="takes a minute; `make test-long` sets SAGELLM_TEST_LONG=1"
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("more", [[], ["--kill"]])
def test_a_small_run(tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "chat.json"
    assert main(["--quick", "--users", "4", "--turns", "2", "--json", str(out), *more]) == 0
    found = json.loads(out.read_text())
    assert found["equal"] and len(found["killed"]) == (8 if more else 0)
    assert {row["stack"] for row in found["rows"]} == {"on", "off"}
