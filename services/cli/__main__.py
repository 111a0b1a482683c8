"""`sagellm`: start, stop, look into and talk to a cluster.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 no such cluster, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer
from rich.markup import escape

from sagellm_common.client.aio import AsyncClient, Options, Prompt, gather
from sagellm_common.client.router import (
    ClassStrategy,
    ClusterView,
    ProbedLinks,
    RoleChange,
    WorkerEviction,
    WorkerTransport,
)
from sagellm_common.client.sync import Client
from sagellm_common.comm_backend.hardware import probe_all
from sagellm_common.comm_backend.topology import probe_machine
from sagellm_common.core.config_loader import config_schema, dump_config, load_config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import WorkerRole
from sagellm_common.engines.lmdeploy.overlay import existing_overlay
from services.cli import benchmarks, doctor, patches, render, run, transport
from services.cli.cluster import Cluster, StartFailed
from services.cli.home import ClusterHome
from services.cli.status import NotRunning, running_state, status_document, view_of

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="sagellm",
    help="Disaggregated LLM serving: prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="The configuration as it is understood.", no_args_is_help=True)
app.add_typer(config_app, name="config")
transport_app = typer.Typer(help="How KV moves between workers.", no_args_is_help=True)
app.add_typer(transport_app, name="transport")
kv_app = typer.Typer(help="What the workers and stores have cached.", no_args_is_help=True)
app.add_typer(kv_app, name="kv")
router_app = typer.Typer(help="How requests are placed on workers.", no_args_is_help=True)
app.add_typer(router_app, name="router")
strategy_app = typer.Typer(help="Which worker gets which request.", no_args_is_help=True)
router_app.add_typer(strategy_app, name="strategy")
policy_app = typer.Typer(help="Which cached blocks go first.", no_args_is_help=True)
kv_app.add_typer(policy_app, name="policy")
worker_app = typer.Typer(help="Running workers: other roles, and their end.", no_args_is_help=True)
app.add_typer(worker_app, name="worker")
engine_app = typer.Typer(help="The engine inside the workers.", no_args_is_help=True)
app.add_typer(engine_app, name="engine")
doctor_app = typer.Typer(help="What went wrong, and what to do about it.", no_args_is_help=True)
app.add_typer(doctor_app, name="doctor")

Name = Annotated[str, typer.Option("--name", help="the cluster; cluster.name unless given")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML configuration")]
Set = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="overrides one setting")]
Json = Annotated[bool, typer.Option("--json", help="print data as JSON")]
Router = Annotated[str, typer.Option("--router", metavar="HOST:PORT", help="of a cluster not started here")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="tokens to generate at most")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy")]
Grace = Annotated[
    float | None, typer.Option("--grace-s", min=0.0, help="for what runs there; cluster.drain_grace_s unless given")
]
Seed = Annotated[int | None, typer.Option(help="makes sampling repeatable")]


# ---- the cluster ----


@app.command()
def up(
    prefill: Annotated[int, typer.Option(min=1, help="prefill workers")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="decode workers")] = 1,
    kv_store: Annotated[int | None, typer.Option(min=0, help="KV stores; as kv_store.stores")] = None,
    config: ConfigFile = None,
    set_: Set = [],  # noqa: B006 - typer copies it
    name: Name = "",
    detach: Annotated[bool, typer.Option("--detach", help="return when it serves; `sagellm down` stops it")] = False,
    json_: Json = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Start a cluster on this machine; Ctrl-C stops it."""
    if kv_store is not None:
        set_ = [*set_, f"kv_store.stores={kv_store}"]
    resolved = run.resolve_config(config, set_, name)
    home = ClusterHome(resolved.cluster.name)
    if detach:
        arguments = [f"--prefill={prefill}", f"--decode={decode}", *(f"--set={s}" for s in set_)]
        arguments += [f"--config={config}"] * bool(config) + [f"--name={name}"] * bool(name) + ["--json"] * json_
        code, printed = run.up_detached(arguments)
        sys.stdout.buffer.write(printed)
        raise typer.Exit(code)

    async def serve() -> None:
        cluster = Cluster(resolved, home, prefill, decode)

        async def on_ready() -> None:
            state = running_state(home.name)
            if json_:
                _print_json(status_document(state, await view_of(state)), indent=None)
            else:
                stop_with = f"sagellm down --name {home.name}" if supervised else "Ctrl-C"
                render.out.print(render.served(state, home.path / "logs", stop_with))
            sys.stdout.flush()
            if supervised:
                run.detach_output(home.log_file("supervisor"))

        await run.serve(cluster, on_ready)

    asyncio.run(serve())


@app.command()
def down(name: Name = "") -> None:
    """Stop a cluster, and wait until nothing of it runs."""
    name = _name(name)
    run.down(name)
    render.err.print(f"cluster {name!r} stopped")


@app.command()
def status(name: Name = "", json_: Json = False) -> None:
    """Processes, workers and their KV blocks."""
    state = running_state(_name(name))
    view = asyncio.run(view_of(state))
    if json_:
        _print_json(status_document(state, view))
        return
    render.out.print(render.served(state))
    render.out.print(render.status_table(state, view))
    render.out.print(render.engines(view))
    if kept := render.tiers(view):
        render.out.print(kept)
    if changed := render.transport_changes(view):
        render.out.print(changed)


# ---- requests ----


@app.command()
def chat(
    message: str,
    system: Annotated[str, typer.Option(help="system message")] = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Ask the model, through its chat template."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    _generate(messages, name, router, json_, **_options(max_tokens, temperature, seed))


@app.command()
def generate(
    prompt: str,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Let the model continue a text."""
    _generate(prompt, name, router, json_, **_options(max_tokens, temperature, seed))


@app.command()
def explain(request_id: str, name: Name = "", router: Router = "", json_: Json = False) -> None:
    """What was planned for a request, instead of what, and when what happened."""
    with _client(name, router) as client:
        explanation = client.explain(request_id)
    if json_:
        _print_json(asdict(explanation))
        return
    render.out.print(f"{explanation.plan.request_id} · {explanation.plan.strategy} · {explanation.plan.reason}\n")
    render.out.print(render.plan_diagram(explanation.plan, explanation.node_states))
    render.out.print(render.candidates_table(explanation.candidates))
    render.out.print(render.counterfactual(explanation.counterfactual), "\n")
    render.out.print(render.explanation_table(explanation))


@app.command()
def demo() -> None:
    """From nothing to an answered chat, with what happened on the way."""
    from services.cli.demo import run_demo

    asyncio.run(run_demo())


@doctor_app.command("handoff")
def doctor_handoff(
    request_id: Annotated[str, typer.Argument(help="tell the story of this request's")] = "",
    last: Annotated[int, typer.Option(min=1, help="so many, the newest last")] = 20,
    failed: Annotated[bool, typer.Option("--failed", help="only those that failed or were cancelled")] = False,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """What became of KV handoffs, as both of their workers saw them. Exit code 1: nobody remembers the request."""
    state = None if router else running_state(_name(name))
    address = state.router_address if state is not None else router
    found = asyncio.run(doctor.examine(address, state, request_id=request_id, last=last, failed=failed))
    if json_:
        _print_json(doctor.document(found))
    elif request_id:
        for handoff in found.handoffs:
            for part in doctor.story(handoff, found):
                render.out.print(part)
    else:
        nothing = f"no {'failed ' * failed}handoffs are remembered"
        render.out.print(doctor.handoffs_table(found.handoffs) if found.handoffs else nothing)
    for worker_id, why in sorted(found.not_asked.items()):
        render.err.print(f"[yellow]{worker_id} could not be asked:[/] {escape(why)}", soft_wrap=True)
    if request_id and not found.handoffs:
        which = "failed handoff" if failed else "handoff"
        _fail(f"no worker remembers a {which} of request {request_id!r}", EXIT_FAILED)


# ---- configuration ----


@config_app.command("show")
def config_show(config: ConfigFile = None, set_: Set = [], json_: Json = False) -> None:  # noqa: B006
    """Defaults, file, environment and flags together."""
    resolved = load_config(config, os.environ, set_)
    if json_:
        _print_json(resolved.model_dump(mode="json"))
    else:
        typer.echo(dump_config(resolved), nl=False)


@config_app.command("schema")
def config_schema_() -> None:
    """The JSON schema: every key, its default and what it means."""
    _print_json(config_schema())


@config_app.command("validate")
def config_validate(file: Path, json_: Json = False) -> None:
    """Check a file; exit code 2 and what is wrong if it is not valid."""
    load_config(file, {}, ())
    if json_:
        _print_json({"file": str(file), "valid": True})
    else:
        render.err.print(f"{file} is valid")


# ---- transport ----


@transport_app.command("probe")
def transport_probe(
    max_bytes: Annotated[int, typer.Option("--bytes", min=0, help="per pull at most; 0: the workers' default")] = 0,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Measure the links between all workers, over the byte path that KV takes; exit code 1 if none could be."""

    async def run_probe() -> ProbedLinks:
        async with AsyncClient(_router(name, router)) as client:
            return await client.probe_links(max_bytes=max_bytes)

    probed = asyncio.run(run_probe())
    if json_:
        _print_json(transport.links_document(probed.links, probed.failures))
    else:
        _print_links(probed.links)
        for failure in probed.failures:
            render.err.print(f"not measured: {failure}", markup=False)
    if not probed.links:
        raise typer.Exit(EXIT_FAILED)


@transport_app.command("show")
def transport_show(name: Name = "", router: Router = "", json_: Json = False) -> None:
    """What links cost as far as it is known, settings in force, and what this machine has to move KV with."""

    async def ask() -> tuple[ClusterView, tuple[WorkerTransport, ...]]:
        async with AsyncClient(_router(name, router)) as client:
            return await client.topology(), await client.set_transport({})

    view, workers = asyncio.run(ask())
    machine = probe_machine()
    if json_:
        document = transport.links_document(view.links)
        _print_json(document | {"workers": [asdict(w) for w in workers], "machine": asdict(machine)})
        return
    if view.links:
        _print_links(view.links)
    else:
        render.out.print("no link is measured yet: `sagellm transport probe` does it, and so do requests")
    render.out.print(transport.settings_table(workers))
    render.out.print(transport.machine_table(machine))
    _tell_refusals(workers)


@transport_app.command("set")
def transport_set(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="keys of the section transport")],
    worker: Annotated[list[str], typer.Option("--worker", metavar="ID", help="only these; all unless given")] = [],  # noqa: B006
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Change settings of running workers, until they restart; exit code 1 if one of them refuses."""
    wanted = transport.parse_settings(settings)

    async def change() -> tuple[WorkerTransport, ...]:
        async with AsyncClient(_router(name, router)) as client:
            return await client.set_transport(wanted, worker)

    workers = asyncio.run(change())
    if json_:
        _print_json({"workers": [asdict(w) for w in workers]})
    elif any(not worker.error for worker in workers):
        render.out.print(transport.settings_table(workers))
    if _tell_refusals(workers):
        raise typer.Exit(EXIT_FAILED)


def _print_links(links: Sequence[LinkCost]) -> None:
    matrix = transport.links_matrix(links)
    # As wide as it is: a matrix that is cut tells nothing.
    render.out.print(matrix, width=max(render.out.width, transport.COLUMN_WIDTH * len(matrix.columns)), crop=False)
    if advice := transport.advice_line(links):
        render.out.print(advice, soft_wrap=True)


def _tell_refusals(workers: Sequence[WorkerTransport | WorkerEviction]) -> bool:
    """Whether there are any."""
    refused = [worker for worker in workers if worker.error]
    for worker in refused:
        render.err.print(f"{worker.worker_id}: {worker.error}", markup=False, soft_wrap=True)
    return bool(refused)


# ---- kv ----


@policy_app.command("show")
def policy_show(name: Name = "", router: Router = "", json_: Json = False) -> None:
    """The eviction policies in force, and the blocks they have to choose from."""
    _eviction("", [], name, router, json_)


@policy_app.command("set")
def policy_set(
    policy: Annotated[
        str, typer.Argument(metavar="[POLICY]", help="see engine.eviction in `sagellm config schema`")
    ] = "",
    migration: Annotated[str, typer.Option(metavar="NAME", help="of stores with a disk; see kv_store.disk")] = "",
    worker: Annotated[list[str], typer.Option("--worker", metavar="ID", help="only these; all unless given")] = [],  # noqa: B006
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Another policy for running workers and stores, until they restart; exit code 1 if one of them refuses."""
    if not policy and not migration:
        raise typer.BadParameter("name an eviction policy, or --migration; `sagellm kv policy show` tells both")
    _eviction(policy, worker, name, router, json_, migration)


def _eviction(policy: str, worker_ids: Sequence[str], name: str, router: str, json_: bool, migration: str = "") -> None:
    async def ask() -> tuple[WorkerEviction, ...]:
        async with AsyncClient(_router(name, router)) as client:
            return await client.set_eviction(policy, worker_ids, migration)

    workers = asyncio.run(ask())
    if json_:
        _print_json({"workers": [asdict(w) for w in workers]})
    else:
        render.out.print(render.eviction_table(workers))
    if _tell_refusals(workers):
        raise typer.Exit(EXIT_FAILED)


# ---- workers ----


class Role(enum.StrEnum):
    """Those that a running worker can take."""

    PREFILL = WorkerRole.PREFILL.value
    DECODE = WorkerRole.DECODE.value
    BOTH = WorkerRole.BOTH.value


@worker_app.command("set-role")
def worker_set_role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="its id, as `sagellm status` has it")],
    role: Role,
    grace_s: Grace = None,
    keep_engine: Annotated[
        bool, typer.Option("--keep-engine", help="even if a worker that starts in that role has other engine settings")
    ] = False,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Let a running worker prefill, decode or do both from now on. What runs there goes on, there or elsewhere."""

    async def change() -> RoleChange:
        async with AsyncClient(_router(name, router)) as client:
            return await client.set_role(worker, WorkerRole(role), grace_s=grace_s, keep_engine=keep_engine)

    changed = asyncio.run(change())
    now, before, left = changed.record.role.value, changed.before.value, changed.unfinished_requests
    if json_:
        _print_json({"worker_id": worker, "role": now, "before": before, "unfinished_requests": left})
        return
    render.err.print(f"{worker}: {now}, was {before}", markup=False)
    if left:
        render.err.print(f"{left} requests of the old role still run there", markup=False)


@worker_app.command("drain")
def worker_drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="its id, as `sagellm status` has it")],
    grace_s: Grace = None,
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Let a worker or store give what it does to others, or finish it, and end. Exit code 1: some was left unfinished,
    and goes on elsewhere from what the client has got."""

    async def drain() -> int:
        async with AsyncClient(_router(name, router)) as client:
            return await client.drain_worker(worker, grace_s=grace_s)

    unfinished = asyncio.run(drain())
    if json_:
        _print_json({"worker_id": worker, "unfinished_requests": unfinished})
    else:
        render.err.print(f"{worker} is drained, {unfinished} requests unfinished", markup=False)
    if unfinished:
        raise typer.Exit(EXIT_FAILED)


# ---- strategies ----


@strategy_app.command("show")
def strategy_show(name: Name = "", router: Router = "", json_: Json = False) -> None:
    """The strategies in force, for each class of requests that has its own, and what they have placed."""
    _strategy("", "", name, router, json_)


@strategy_app.command("set")
def strategy_set(
    strategy: Annotated[str, typer.Argument(metavar="STRATEGY", help="see router.strategy in `sagellm config schema`")],
    class_: Annotated[str, typer.Option("--class", metavar="NAME", help="of router.classes; all without one")] = "",
    name: Name = "",
    router: Router = "",
    json_: Json = False,
) -> None:
    """Another strategy from the next request on, until the router restarts."""
    _strategy(strategy, class_, name, router, json_)


def _strategy(strategy: str, service_class: str, name: str, router: str, json_: bool) -> None:
    async def ask() -> tuple[ClassStrategy, ...]:
        async with AsyncClient(_router(name, router)) as client:
            return await client.set_strategy(strategy, service_class)

    classes = asyncio.run(ask())
    if json_:
        _print_json({"classes": [asdict(one) for one in classes]})
    else:
        render.out.print(render.strategy_table(classes))


# ---- engine ----


@engine_app.command("patches")
def engine_patches(
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a patched copy; if not given, what the engine would take")
    ] = None,
    build: Annotated[bool, typer.Option("--build", help="make the engine's patched copy unless it is there")] = False,
    json_: Json = False,
) -> None:
    """Which patches LMDeploy has; exit code 1 when one is half applied or does not apply."""
    if build and overlay:
        raise ConfigError("--build makes the engine's own copy; leave --overlay out")
    found = patches.patched_tree(patches.build_overlay() if build else overlay or existing_overlay())
    if json_:
        _print_json(asdict(found))
    else:
        render.out.print(patches.patches_view(found))
    if not found.usable:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def devices(json_: Json = False) -> None:
    """What this machine can compute on, and what keeps it from it."""
    found = probe_all()
    if json_:
        _print_json([asdict(device) | {"usable": device.usable} for device in found])
    else:
        render.out.print(render.devices_table(found))


@app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench_(context: typer.Context, name: Annotated[str, typer.Argument(metavar="BENCHMARK")] = "") -> None:
    """Run a benchmark of a checkout: `sagellm bench transfer --help`."""
    raise typer.Exit(benchmarks.run(name, context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def simulate(context: typer.Context) -> None:
    """Replay a trace through the scheduler on simulated engines: `sagellm simulate --help`."""
    raise typer.Exit(benchmarks.run_module("bench.sim", "simulate", context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def plan(context: typer.Context) -> None:
    """How many workers a trace needs, and what they cost, by simulation: `sagellm plan --help`."""
    raise typer.Exit(benchmarks.run_module("bench.plan", "plan", context.args))


# ---- helpers ----


def _name(name: str) -> str:
    return name or load_config(None, os.environ).cluster.name


def _router(name: str, router: str) -> str:
    return router or running_state(_name(name)).router_address


def _client(name: str, router: str) -> Client:
    if router:
        return Client(router)
    state = running_state(_name(name))
    return Client(state.router_address, model_path=state.model_path)


def _options(max_tokens: int | None, temperature: float, seed: int | None) -> Options:
    options: Options = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if seed is not None:
        options["seed"] = seed
    return options


def _generate(prompt: Prompt, name: str, router: str, as_json: bool, **options: Unpack[Options]) -> None:
    """Text on stdout as it comes, what happened on stderr."""
    outputs = []
    with _client(name, router) as client:
        for output in client.generate(prompt, **options):
            outputs.append(output)
            if not as_json:
                sys.stdout.write(output.text)
                sys.stdout.flush()
    completion = gather(outputs)
    if as_json:
        _print_json(asdict(completion))
        return
    typer.echo()
    render.err.print(render.footer(completion))


def _print_json(value: Any, indent: int | None = 2) -> None:
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def main() -> None:
    """Entry point: typed errors become one message and an exit code."""
    try:
        app()
    except ConfigError as error:
        _fail(error.message, EXIT_USAGE)
    except NotRunning as error:
        _fail(str(error), EXIT_NOT_RUNNING)
    except SageError as error:
        _fail(f"{error.reason}: {error.message}", EXIT_FAILED)
    except StartFailed as error:
        said = "".join(f"\n  │ {line}" for line in error.tail)
        _fail(f"{error}{said}\n  log: {error.log}", EXIT_FAILED)
    except (run.Interrupted, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `sagellm … | head` is no failure
        sys.exit(0)


def _fail(message: str, code: int) -> None:
    render.error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
