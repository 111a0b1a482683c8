"""The rendered chart beside the services as they are: their own parsers read its command lines and configuration."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from helm import schema
from helm.check import CHART, Failed
from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.ports import SagePorts
from sagellm_common.core.topology_etcd import EtcdTopology
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.http_server import HttpServer
from sagellm_common.rpc.server import LIVE
from sagellm_common.rpc.worker_main import WorkerArgs, parse_worker_args
from services.autoscaler.app import GROUP_VERSION, METRIC, make_custom_metrics_app
from services.cli.cluster import STOP_MARGIN_S
from tests.support.chart import (
    CI_VALUES,
    OURS,
    Release,
    arguments,
    container_of,
    environment,
    part_of,
    pod_of,
    values_file,
)

POD_IP = "10.1.2.3"
SECRETS = {"api_keys": "one,two", "route_key": "0123456789abcdef0123456789abcdef"}
SMALLEST: dict[str, Any] = {"model": {"path": "/models/m"}}


@pytest.fixture(scope="module", params=CI_VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def release(request: pytest.FixtureRequest) -> Release:
    return Release.of(request.param)


@pytest.fixture
def config(release: Release, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(release.config_text())
    return path


def _started(
    release: Release, part: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], dict[str, str]]:
    """The arguments of a part's container, whose environment is ours from now on."""
    container = container_of(release.workload(part))
    env = environment(container, f"demo-sagellm-{part}-0", POD_IP, SECRETS)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return arguments(container, env, config), env


# ---- what the containers run ----


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.KV_STORE])
def test_a_worker_takes_its_command_line(
    release: Release, config: Path, role: WorkerRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = role.replace("_", "-")
    if part not in release.workloads():
        assert not load_config(config, {}).kv_store.enabled
        return
    argv, env = _started(release, part, config, monkeypatch)

    args = parse_worker_args(role if role is WorkerRole.KV_STORE else None, argv)

    ports = SagePorts(args.config.cluster.port_base)
    session = 0 if role is WorkerRole.KV_STORE else ports.session(1)  # a store has no sessions
    assert args == WorkerArgs(
        role=role,
        config=args.config,
        loaded=args.loaded,
        worker_id=env["POD_NAME"],
        port=ports.worker(0),
        data_port=ports.worker_data(0),
        session_port=session,
        metrics_port=ports.metrics(1),
        router="demo-sagellm-router.llm.svc:18801",
    )
    assert args.config.cluster.host == POD_IP
    assert _container_ports(release, part) == {
        "grpc": args.port,
        "kv": args.data_port,
        "metrics": args.metrics_port,
    } | ({"session": session} if session else {})


def test_the_router_takes_its_command_line(release: Release, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, _ = _started(release, "router", config, monkeypatch)

    loaded, port, session_port, metrics_port = _run_main("router", "run", argv, monkeypatch)

    ports = SagePorts(loaded.cluster.port_base)
    assert (port, session_port, metrics_port) == (ports.router, ports.session(0), ports.metrics(0))
    assert loaded.router.address == f"demo-sagellm-router.llm.svc:{port}"
    assert _container_ports(release, "router") == {"grpc": port, "session": session_port, "metrics": metrics_port}


def test_the_gateway_takes_its_command_line(release: Release, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, env = _started(release, "gateway", config, monkeypatch)

    loaded, port, router = _run_main("gateway", "serve", argv, monkeypatch)

    assert port == SagePorts(loaded.cluster.port_base).gateway
    assert router == loaded.router.address
    assert loaded.cluster.host == "0.0.0.0", "kubectl port-forward comes over loopback"
    assert loaded.gateway.api_keys == (("one", "two") if "SAGELLM_GATEWAY__API_KEYS" in env else ())
    assert _container_ports(release, "gateway") == {"http": port}


def _run_main(service: str, entry: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What `main` would have served with."""
    module = importlib.import_module(f"services.{service}.__main__")
    calls: list[tuple[Any, ...]] = []

    async def serve(*args: Any) -> None:
        calls.append(args)

    monkeypatch.setattr(module, entry, serve)
    for name in ("setup_logging", "setup_tracing", "shutdown_tracing"):
        monkeypatch.setattr(module, name, lambda *_: None)
    assert module.main(argv) == 0
    (args,) = calls
    return args


def _container_ports(release: Release, part: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(release.workload(part))["ports"]}


def test_the_autoscaler_takes_its_command_line_and_may_do_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Release.of(CHART / "ci" / "autoscaled-values.yaml")
    config = tmp_path / "config.yaml"
    config.write_text(release.config_text())
    argv, _ = _started(release, "autoscaler", config, monkeypatch)
    assert argv[0] == f"--config={config}"
    own = load_config(config, {}).autoscaler
    assert own.mode == "act"
    workloads = {f"deployment/{w['metadata']['name']}": w for w in release.kind("Deployment")}
    for target in (own.prefill_target, own.decode_target):
        assert "replicas" not in workloads[target]["spec"], "an upgrade would undo what was scaled"
    (role,) = release.kind("Role")
    allowed = {(r, n) for rule in role["rules"] for r in rule["resources"] for n in rule.get("resourceNames", ["*"])}
    assert {
        ("deployments/scale", target.partition("/")[2]) for target in (own.prefill_target, own.decode_target)
    } < allowed
    assert ("leases", own.lease) in allowed
    (metrics,) = own.routers
    services = {s["metadata"]["name"]: s for s in release.kind("Service")}
    host, _, port = metrics.partition(":")
    assert int(port) in {p["port"] for p in services[host.partition(".")[0]]["spec"]["ports"]}
    with_token = {
        part_of(w) for w in release.kind("Deployment", "StatefulSet") if pod_of(w)["automountServiceAccountToken"]
    }
    assert with_token == {"autoscaler"}


@pytest.mark.parametrize(
    ("router", "told"),
    [({}, "config.router.ttft_target_ms is not set"), ({"ttft_target_ms": 1, "tpot_target_ms": 1}, "learns no costs")],
)
def test_an_autoscaler_that_could_not_plan_is_refused(router: dict[str, Any], told: str, tmp_path: Path) -> None:
    values = {**SMALLEST, "config": {"router": router}, "autoscaler": {"enabled": True}}
    with pytest.raises(Failed, match=told):
        Release.of(values_file(tmp_path / "values.yaml", values))


def test_keda_asks_the_autoscaler(tmp_path: Path) -> None:
    release = Release.of(CHART / "ci" / "keda-values.yaml")
    config = tmp_path / "config.yaml"
    config.write_text(release.config_text())
    assert load_config(config, {}).autoscaler.mode == "dry-run", "one of them scales, not both"
    for scaled in release.kind("ScaledObject"):
        (trigger,) = scaled["spec"]["triggers"]
        part = scaled["spec"]["scaleTargetRef"]["name"].rpartition("-")[2]
        assert trigger["metadata"]["url"] == f"http://demo-sagellm-autoscaler.llm.svc/keda/{part}"


def test_containers_run_our_modules(release: Release) -> None:
    for part, workload in release.workloads().items():
        *python, module = container_of(workload)["command"]
        assert python == ["python", "-m"]
        assert importlib.import_module(f"{module}.__main__")
        assert module == f"services.{'worker' if part in ('prefill', 'decode') else part.replace('-', '_')}"


# ---- configuration ----


def test_the_configuration_is_valid_and_says_what_the_values_say(
    release: Release, config: Path, request: pytest.FixtureRequest
) -> None:
    values = yaml.safe_load(request.node.callspec.params["release"].read_text())
    loaded = load_config(config, {})

    assert loaded.model.path == values["model"]["path"]
    for section, settings in values.get("config", {}).items():
        assert _contains(getattr(loaded, section).model_dump(), settings), section
    for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
        loaded.of_role(role)


def _contains(whole: dict[str, Any], part: dict[str, Any]) -> bool:
    return all(
        _contains(whole[key], value) if isinstance(value, dict) else whole[key] == value for key, value in part.items()
    )


def test_etcd_is_where_the_configuration_says(release: Release, config: Path) -> None:
    topology = load_config(config, {}).topology
    own = [w for w in release.kind("StatefulSet") if part_of(w) == "etcd"]
    if topology.backend == "embedded":
        assert not own and release.workload("router")["spec"]["replicas"] == 1
        return
    EtcdTopology(topology.endpoints, "demo")  # takes the endpoints
    if own:
        name, spec = own[0]["metadata"]["name"], own[0]["spec"]
        (service,) = [s for s in release.kind("Service") if s["metadata"]["name"] == spec["serviceName"]]
        assert service["spec"]["clusterIP"] == "None"
        assert topology.endpoints == tuple(
            f"{name}-{index}.{spec['serviceName']}.llm.svc:{SagePorts().etcd_client}"
            for index in range(spec["replicas"])
        )


def test_the_stores_disk_is_mounted_where_they_write(release: Release, config: Path) -> None:
    path = load_config(config, {}).kv_store.disk.path
    if not path:
        assert all("volumeClaimTemplates" not in w["spec"] for p, w in release.workloads().items() if p == "kv-store")
        return
    store = release.workload("kv-store")
    claims = [claim["metadata"]["name"] for claim in store["spec"]["volumeClaimTemplates"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(store)["volumeMounts"]}
    assert any(path.startswith(mounts[claim]) for claim in claims)


def test_who_reads_the_checkpoint_has_it(release: Release, config: Path) -> None:
    path = load_config(config, {}).model.path
    having = {
        part
        for part, workload in release.workloads().items()
        for mount in container_of(workload)["volumeMounts"]
        if mount["name"] == "model" and path.startswith(mount["mountPath"])
    }
    assert having in ({"prefill", "decode", "gateway"}, set()), having
    assert bool(having) == path.startswith("/models/")


# ---- life of a pod ----


def test_probes_ask_where_the_services_answer(release: Release) -> None:
    for part, workload in release.workloads().items():
        container = container_of(workload)
        port = _container_ports(release, part)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if part in ("gateway", "autoscaler"):
                assert container[probe]["httpGet"]["port"] == "http"
                assert container[probe]["httpGet"]["path"] in ("/health", "/ready")
            else:
                live = {"service": LIVE} if probe == "livenessProbe" else {}
                assert container[probe]["grpc"] == {"port": port["grpc"], **live}, "one that drains is not restarted"


def test_grace_is_longer_than_the_drain(release: Release, config: Path) -> None:
    for part, workload in release.workloads().items():
        if part == "autoscaler":
            continue  # it holds no requests
        container = container_of(workload)
        env = environment(container, f"demo-{part}-0", POD_IP, SECRETS)
        grace_s = load_config(config, env).cluster.drain_grace_s
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        before_s = float(command[1]) if command[0] == "sleep" else 0.0
        if not before_s:
            assert float(command[-1].removeprefix("--grace-s=")) == grace_s, "what SIGTERM would give it, too"
        assert grace_s > 10, part
        assert pod_of(workload)["terminationGracePeriodSeconds"] >= before_s + grace_s + STOP_MARGIN_S + 5, part


def test_pods_get_no_variables_of_kubernetes_own(release: Release) -> None:
    """SAGELLM_ROUTER_PORT of a Service `sagellm-router` would be refused as an unknown setting."""
    pods = [pod_of(w) for w in release.kind("Deployment", "StatefulSet")]
    assert all(pod["enableServiceLinks"] is False for pod in pods + [p["spec"] for p in release.kind("Pod")])


def test_no_pod_runs_as_root_or_writes_its_image(release: Release) -> None:
    workloads = release.kind("Deployment", "StatefulSet")
    claims = {claim["metadata"]["name"] for w in workloads for claim in w["spec"].get("volumeClaimTemplates", [])}
    for pod in [pod_of(w) for w in workloads] + [p["spec"] for p in release.kind("Pod")]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is (pod["containers"][0]["name"] == "autoscaler")
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= claims | {volume["name"] for volume in pod.get("volumes", [])}


def test_selectors_find_their_pods(release: Release) -> None:
    labels = [w["spec"]["template"]["metadata"]["labels"] for w in release.kind("Deployment", "StatefulSet")]
    for manifest in release.kind("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
        spec = manifest["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        wanted = selector.get("matchLabels", selector)
        found = [own for own in labels if wanted.items() <= own.items()]
        assert len(found) == 1, f"{manifest['kind']} {manifest['metadata']['name']}"
    assert len(release.kind("PodDisruptionBudget")) == len(labels)


def test_services_lead_to_ports_that_are_there(release: Release) -> None:
    parts = {part_of(w): container_of(w) for w in release.kind("Deployment", "StatefulSet")}
    for service in release.kind("Service"):
        names = {port["name"]: port["containerPort"] for port in parts[part_of(service)]["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in names
            if part_of(service) not in ("gateway", "autoscaler"):
                assert port["port"] == names[port["targetPort"]], "clients are told the port itself"


def test_networks_let_the_cluster_talk(release: Release, config: Path) -> None:
    policies = {part_of(policy): policy["spec"]["ingress"] for policy in release.kind("NetworkPolicy")}
    if not policies:
        return
    assert set(policies) == {part_of(w) for w in release.kind("Deployment", "StatefulSet")}
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "sagellm", "app.kubernetes.io/instance": "demo"}}}
    router = policies.pop("router")[0]
    ports = SagePorts(load_config(config, {}).cluster.port_base)
    assert own in router["from"] and {p["port"] for p in router["ports"]} == {ports.router, ports.session(0)}
    for part, ingress in policies.items():
        assert "from" not in ingress[0] or own in ingress[0]["from"], part


# ---- more models, metrics, scaling ----


def test_each_model_has_workers_of_its_own_and_the_gateway_reads_all_of_them(tmp_path: Path) -> None:
    release = Release.of(CHART / "ci" / "multi-model-values.yaml")
    (files,) = (manifest["data"] for manifest in release.kind("ConfigMap"))
    mounts = {}
    for workload in release.kind("Deployment"):
        container = container_of(workload)
        mounts[part_of(workload)] = {m["mountPath"] for m in container["volumeMounts"] if m["name"].startswith("model")}
        if part_of(workload) in ("prefill-small", "decode-small"):
            (config,) = (arg.partition("=")[2] for arg in container["args"] if arg.startswith("--config="))
            path = tmp_path / "small.yaml"
            path.write_text(files[Path(config).name])
            model = load_config(path, {}).model
            assert (model.path, model.name) == ("/models-small/Qwen2-0.5B-Instruct", "qwen2-0.5b")
            labels = workload["spec"]["template"]["metadata"]["labels"]
            assert labels["sagellm.io/model"] == "small"
            assert part_of(workload) == f"{labels['sagellm.io/role']}-small"
    assert mounts["gateway"] == {"/models", "/models-small"}
    assert mounts["prefill"] == mounts["decode"] == {"/models"}
    assert mounts["prefill-small"] == mounts["decode-small"] == {"/models-small"}
    assert release.workload("decode-small")["spec"]["replicas"] == 2


def test_workers_keep_running_when_only_others_settings_change(tmp_path: Path) -> None:
    def checksums(config: dict[str, Any]) -> dict[str, str]:
        release = Release.of(values_file(tmp_path / "v.yaml", {**SMALLEST, "config": config}))
        of = "checksum/config"
        return {p: w["spec"]["template"]["metadata"]["annotations"][of] for p, w in release.workloads().items()}

    before, after = checksums({}), checksums({"gateway": {"max_body_bytes": 1 << 20}})
    assert {part for part in before if before[part] != after[part]} == {"gateway"}


def test_a_hpa_scales_what_the_autoscaler_wants_through_the_custom_metrics_api() -> None:
    release = Release.of(CHART / "ci" / "hpa-values.yaml")
    (api,) = release.kind("APIService")
    (service,) = (s for s in release.kind("Service") if s["metadata"]["name"] == api["spec"]["service"]["name"])
    (port,) = (p for p in service["spec"]["ports"] if p["port"] == api["spec"]["service"]["port"])
    container = container_of(release.workload("autoscaler"))
    assert _container_ports(release, "autoscaler")[port["targetPort"]] == 18802
    assert "--custom-metrics-port=18802" in container["args"]
    (init,) = pod_of(release.workload("autoscaler"))["initContainers"]
    for flag, name in (("-out", "--certificate"), ("-keyout", "--certificate-key")):
        assert f"{name}={init['args'][init['args'].index(flag) + 1]}" in container["args"]
    deployments = {w["metadata"]["name"]: w for w in release.kind("Deployment")}
    scalers = {h["spec"]["scaleTargetRef"]["name"]: h["spec"] for h in release.kind("HorizontalPodAutoscaler")}
    assert set(scalers) == {f"demo-sagellm-{part}" for part in ("router", "gateway", "prefill", "decode")}
    assert all("replicas" not in deployments[name]["spec"] for name in scalers)
    assert (scalers["demo-sagellm-decode"]["minReplicas"], scalers["demo-sagellm-decode"]["maxReplicas"]) == (2, 8)
    asked = scalers["demo-sagellm-prefill"]["metrics"][0]["object"]
    assert asked["metric"]["name"] == METRIC and asked["describedObject"]["name"] == "demo-sagellm-prefill"


async def test_the_certificate_that_the_chart_makes_serves_the_custom_metrics_api(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here: apt-get install openssl")
    (init,) = pod_of(Release.of(CHART / "ci" / "hpa-values.yaml").workload("autoscaler"))["initContainers"]
    argv = [text.replace("/certificate", str(tmp_path)) for text in [*init["command"], *init["args"]]]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=30)
    undecided = SimpleNamespace(steps=[])
    app = make_custom_metrics_app(undecided, "llm", {"decode": "deployment/d"})  # type: ignore[arg-type]
    server = HttpServer(app, "127.0.0.1", 0, grace_s=1.0, certificate=(tmp_path / "tls.crt", tmp_path / "tls.key"))
    serving = asyncio.create_task(server.serve())
    base = f"https://127.0.0.1:{server.port}/apis/{GROUP_VERSION}"
    async with httpx.AsyncClient(verify=False, trust_env=False) as http:
        resources = (await http.get(base)).json()["resources"]
        wanted = await http.get(f"{base}/namespaces/llm/deployments.apps/d/{METRIC}")
        metrics = await http.get(f"https://127.0.0.1:{server.port}/metrics")
    server.stop()
    await serving
    assert [resource["name"] for resource in resources] == [f"deployments.apps/{METRIC}"]
    assert (wanted.status_code, metrics.status_code) == (503, 404), "nothing is decided; nothing else is served"


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(ConfigError, match="must be PEM"):
        HttpServer(None, "127.0.0.1", 0, grace_s=1.0, certificate=(tmp_path / "x", tmp_path / "x"))  # type: ignore[arg-type]


def test_service_monitors_find_every_metrics_port() -> None:
    release = Release.of(CHART / "ci" / "hpa-values.yaml")
    (monitor,) = release.kind("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    endpoints = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    found = {
        part_of(s)
        for s in release.kind("Service")
        if wanted <= s["metadata"]["labels"].items() and endpoints & {p["name"] for p in s["spec"]["ports"]}
    }
    assert found == {"router", "gateway", "prefill", "decode", "kv-store", "autoscaler"}


# ---- values ----


def test_the_schema_is_that_of_the_services() -> None:
    assert schema.PATH.read_text() == schema.written(), "run python -m helm.schema"


def test_the_schema_knows_every_value_and_no_default_is_missing() -> None:
    """values.yaml is what a person reads: all that can be set is there, or named in its comment."""
    whole = json.loads(schema.PATH.read_text())
    known = whole["properties"]
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    assert set(defaults) | {"global"} == set(known)
    for part, settings in defaults.items():
        rule = whole["$defs"][known[part]["$ref"].rpartition("/")[2]] if "$ref" in known[part] else known[part]
        for name in rule.get("properties", {}) if part != "config" else ():
            assert name in settings or name in text.partition("Each part also takes")[2], f"{part}.{name}"


def test_settings_of_the_services_are_known(tmp_path: Path) -> None:
    config = {"engine": {"num_blocks": 7}, "router": {"max_queue": 9}, "kv_store": {"disk": {"dtype": "int8"}}}
    release = Release.of(values_file(tmp_path / "v.yaml", {**SMALLEST, "config": config}))

    (tmp_path / "c.yaml").write_text(release.config_text())
    loaded: Config = load_config(tmp_path / "c.yaml", {})

    assert (loaded.engine.num_blocks, loaded.router.max_queue, loaded.kv_store.disk.dtype) == (7, 9, "int8")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prefil": {}}, "prefil"),
        ({"config": {"engine": {"devise": "cpu"}}}, "devise"),
        ({"config": {"engine": {"device": "tpu"}}}, "device"),
        ({"config": {"cluster": {"host": "0.0.0.0"}}}, "cluster"),
        ({"config": {"gateway": {"api_keys": ["secret"]}}}, "api_keys"),
        ({"decode": {"replicas": -1}}, "replicas"),
        ({"etcd": {"replicas": 2}}, "replicas"),
        ({"model": {"path": ""}}, "model.path is empty"),
        ({"router": {"replicas": 2}, "etcd": {"replicas": 0}}, "router.replicas above 1 needs etcd"),
        ({"etcd": {"replicas": 3, "storage": ""}}, "etcd.storage is empty"),
        ({"etcd": {"endpoints": ["a:2379"]}}, "set etcd.replicas to 0"),
        ({"router": {"hpa": {"min": 2, "max": 1, "cpuPercent": 50}}, "etcd": {"replicas": 1}}, "router.hpa.min 2 is"),
        ({"router": {"hpa": {"min": 1, "max": 2, "cpuPercent": 50}}, "etcd": {"replicas": 0}}, "router.hpa needs etcd"),
        ({"decode": {"hpa": {"min": 1, "max": 2}}}, "hpa"),
        ({"models": {"Small": {"path": "/models/s"}}}, "Small"),
        ({"models": {"s": {"path": "/models/m", "name": "m"}}}, "models.s is called m"),
        ({"models": {"s": {"path": "/s/m2", "volume": {"emptyDir": {}}}}}, "models.s.mountPath is empty"),
        ({"models": {"s": {"path": "/s/m2", "mountPath": "/s"}}}, "needs models.s.volume"),
        ({"autoscaler": {"enabled": True}, "decode": {"hpa": {"min": 1, "max": 2, "cpuPercent": 9}}}, "decode.hpa and"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_values_are_refused(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=told):
        Release.of(values_file(tmp_path / "v.yaml", {**SMALLEST, **values}))


def test_another_port_base_moves_every_port(tmp_path: Path) -> None:
    release = Release.of(values_file(tmp_path / "v.yaml", {**SMALLEST, "portBase": 30000}))
    ports = SagePorts(30000)
    found = {port for part in release.workloads() for port in _container_ports(release, part).values()}
    services = {
        p["port"] for s in release.kind("Service") if part_of(s) not in ("gateway", "etcd") for p in s["spec"]["ports"]
    }
    router = {ports.router, ports.session(0), ports.metrics(0)}
    worker = {ports.worker(0), ports.worker_data(0), ports.session(1), ports.metrics(1)}
    assert found == router | worker | {ports.gateway}
    assert services <= found
    assert f"port_base: {ports.base}\n" in release.config_text()


def test_each_part_takes_what_values_say_it_takes(tmp_path: Path) -> None:
    extra = {
        "image": "mine:1",
        "nodeSelector": {"disk": "nvme"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "annotations": {"a": "b"},
        "labels": {"team": "llm"},
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        "initContainers": [{"name": "wait", "image": "i", "command": ["true"]}],
    }
    parts: dict[str, Any] = dict.fromkeys(("router", "gateway", "prefill", "decode", "kvStore"), extra)
    parts["etcd"] = {name: value for name, value in extra.items() if name not in schema.NOT_OF_ETCD}
    targets = {"router": {"strategy": "hybrid", "ttft_target_ms": 1, "tpot_target_ms": 1}}
    parts["autoscaler"] = {**extra, "enabled": True}
    release = Release.of(values_file(tmp_path / "v.yaml", {**SMALLEST, "config": targets, **parts}))
    workloads = release.kind("Deployment", "StatefulSet")
    assert len(workloads) == len(OURS) + 1
    for workload in workloads:
        pod, container = pod_of(workload), container_of(workload)
        assert container["image"] == "mine:1"
        whole = {"nodeSelector", "tolerations", "priorityClassName", "runtimeClassName"}
        assert {name: pod[name] for name in whole} == {name: extra[name] for name in whole}
        assert pod["affinity"]["nodeAffinity"] == {}
        if part_of(workload) in OURS:
            assert pod["initContainers"] == extra["initContainers"]
            assert extra["volumes"][0] in pod["volumes"]
            assert extra["volumeMounts"][0] in container["volumeMounts"]
        assert workload["spec"]["template"]["metadata"]["labels"]["team"] == "llm"
        assert extra["env"][0] in container["env"]
        assert workload["spec"]["template"]["metadata"]["annotations"]["a"] == "b"
