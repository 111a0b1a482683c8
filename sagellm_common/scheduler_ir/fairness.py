"""Virtual token counters: who has been served least is next (Sheng et al., OSDI'24, "Fairness in serving LLMs")."""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2
"""A generated token counts as so many of a prompt; the paper's choice, after what providers charge."""
REMEMBERED = 4096
"""Tenants, beyond those that wait. Who is forgotten begins anew, level with the least served."""


def service_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """What serving a request counts for."""
    return prompt_tokens + OUTPUT_WEIGHT * output_tokens


class TokenCounters:
    """Of tenants. Who comes after having had nothing to do is lifted to those who wait: idling earns no credit."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._waiting: Counter[str] = Counter()
        self._last = ""
        """Who left last when nobody waited any more."""

    def __getitem__(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    def enter(self, tenant: str) -> None:
        """One more request of it waits."""
        if not self._waiting[tenant]:
            level = min((self[other] for other in self._waiting if self._waiting[other]), default=self[self._last])
            self._served[tenant] = max(self[tenant], level)
        self._waiting[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One of its requests waits no more, served or not."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = tenant
            self._forget()

    def charge(self, tenant: str, tokens: int) -> None:
        """It has been given so many; less than 0: it did not use them."""
        self._served[tenant] = max(0, self[tenant] + tokens)

    def _forget(self) -> None:
        if len(self._served) <= REMEMBERED + len(self._waiting):
            return
        keep = {*self._waiting, self._last}
        idle = sorted((tenant for tenant in self._served if tenant not in keep), key=self._served.__getitem__)
        for tenant in idle[: len(idle) // 2]:
            del self._served[tenant]
