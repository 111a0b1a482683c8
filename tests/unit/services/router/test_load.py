"""What was sent to a worker is counted until it is done, however that ends."""

from __future__ import annotations

import pytest

from services.router.load import Sent, WorkerLoad


def test_a_request_moves_from_the_queue_to_the_steps() -> None:
    prefill, decode = WorkerLoad(), WorkerLoad()
    with Sent(decode, 100, prefill, start_token=32, prompt_tokens=100) as sent, Sent(decode, 50):
        assert (prefill.queued_prompts, prefill.queued_tokens, prefill.queued_squares) == (1, 68, 100**2 - 32**2)
        assert (decode.sequences, decode.context_tokens, decode.stepping) == (2, 150, 0)
        sent.prefilled()
        sent.prefilled()
        assert prefill == WorkerLoad()
        sent.step(1)
        sent.step(3)
        assert (decode.sequences, decode.context_tokens) == (2, 154)
        assert (decode.stepping, decode.stepping_tokens) == (1, 104)
    assert decode == WorkerLoad()


@pytest.mark.parametrize("steps", [0, 2])
def test_what_fails_is_no_longer_counted(steps: int) -> None:
    both = WorkerLoad()  # a worker that does both parts
    sent = Sent(both, 10, both, start_token=0, prompt_tokens=10)
    with pytest.raises(RuntimeError), sent:
        for _ in range(steps):
            sent.step(1)
        raise RuntimeError
    assert both == WorkerLoad()
    assert sent.over
