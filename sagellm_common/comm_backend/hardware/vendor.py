"""What the probes of all accelerators have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.core.capability import Accelerator

MIB = 1 << 20

Parse = Callable[[str], tuple[Sequence[Accelerator], str]]
"""Output of a tool → (accelerators, driver version). None and "" when it says nothing of the kind."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a machine has of one vendor's devices, and what is missing of their driver."""

    accelerators: tuple[Accelerator, ...]
    driver_version: str
    missing: tuple[str, ...]


def inventory(host: Host, calls: Sequence[Sequence[str]], parse: Parse, node: str, driver: str) -> Inventory:
    """Asks the first tool there is (`calls` are ways to call it, by name of the tool), and explains when none answers.

    `node` is the glob pattern of the device nodes, `driver` says how to get the driver.
    """
    problems = []
    for argv in calls:
        run = host.run(*argv)
        if run is None:
            continue
        found, version = ((), "") if run.problem else parse(run.stdout)
        if found:
            return Inventory(tuple(found), version, ())
        problems.append(run.problem or f"{argv[0]} lists no device")
    if not host.nodes(node):
        return Inventory((), "", (f"there is no device node {node}: {driver}",))
    tools = " or ".join(dict.fromkeys(argv[0] for argv in calls))
    nothing = f"{tools} is not on PATH, although there is {host.nodes(node)[0]}: it comes with the driver; {driver}"
    return Inventory((), "", (problems[0] if problems else nothing,))


def lacking(host: Host, packages: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """(package, how to get it) of those Python does not find, as entries for `missing`."""
    return tuple(
        f"the Python package {name} is not installed: {fix}" for name, fix in packages if not host.has_package(name)
    )
