"""Plug-ins by name. A duplicate raises; an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sagellm_common.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: adds the item under `name` and returns it. Raises ValueError on a duplicate."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Raises ConfigError naming the known ones."""
        try:
            return self._items[name]
        except KeyError:
            raise ConfigError(
                f"unknown {self._kind} {name!r}; known: {', '.join(sorted(self._items)) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
