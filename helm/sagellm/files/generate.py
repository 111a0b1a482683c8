"""`helm test`: waits until a model is served, and lets it generate through the gateway. Needs nothing but Python."""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

RETRY_S = 1.0
MAX_TOKENS = 8


def ask(url: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
    """GET, or POST of a body. Raises urllib.error.URLError."""
    headers = {"content-type": "application/json"}
    if key := os.environ.get("API_KEYS", "").split(",")[0].strip():
        headers["authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout_s) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def first_model(url: str, timeout_s: float) -> str:
    """Raises the last error once the time is up; any 4xx at once."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return str(ask(f"{url}/v1/models", None, timeout_s)["data"][0]["id"])
        except urllib.error.URLError as err:
            refused = isinstance(err, urllib.error.HTTPError) and err.code < 500
            if refused or time.monotonic() + RETRY_S > deadline:
                raise
            time.sleep(RETRY_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="of the gateway")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="for each of the two steps")
    args = parser.parse_args()
    try:
        model = first_model(args.url, args.timeout_s)
        body = {"model": model, "prompt": "The sea is", "max_tokens": MAX_TOKENS, "temperature": 0}
        answer = ask(f"{args.url}/v1/completions", body, args.timeout_s)
    except OSError as err:
        detail = err.read().decode(errors="replace") if isinstance(err, urllib.error.HTTPError) else ""
        print(f"{args.url}: {err} {detail}", file=sys.stderr)
        return 1
    tokens = answer["usage"]["completion_tokens"]
    print(f"{model}: {tokens} tokens: {answer['choices'][0]['text']!r}; ran on {answer.get('sagellm')}")
    return 0 if tokens > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
