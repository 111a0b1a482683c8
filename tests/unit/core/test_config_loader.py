from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import config_schema, dump_config, load_config, transport_presets
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import WorkerRole


def write(directory: Path, text: str) -> Path:
    path = directory / "sagellm.yaml"
    path.write_text(text)
    return path


def problems(path: Path | None = None, env: dict[str, str] | None = None, flags: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, env or {}, flags)
    return caught.value.message.splitlines()


def test_nothing_given_is_the_defaults() -> None:
    assert load_config(None, {}, []) == Config()


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {max_queue: 1, max_attempts: 1, request_timeout_s: 1}")
    env = {"SAGELLM_ROUTER__MAX_QUEUE": "2", "SAGELLM_ROUTER__MAX_ATTEMPTS": "2"}
    router = load_config(path, env, ["router.max_queue=3"]).router
    assert (router.max_queue, router.max_attempts, router.request_timeout_s) == (3, 2, 1.0)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("transport.digest=false", False),
        ("transport.digest=off", False),
        ("transport.timeout_s=1.5", 1.5),
        ("engine.kv_quant_bits=8", 8),
        ("prefill.block_size_tokens=32", 32),
        ("decode.kv_quant_bits=8", 8),
        ("prefill.dtype=bfloat16", "bfloat16"),
        ("transport.wire_dtype=int8", "int8"),
        ("decode.prefix_caching=false", False),
        ("cluster.name=5", "5"),
        ("cluster.name=null", "null"),
        ("model.path=/a=b/[c", "/a=b/[c"),
        ("model.path=", ""),
        ("topology.endpoints=[a:1, b:2]", ("a:1", "b:2")),
        ("topology.endpoints=a:1,b:2", ("a:1", "b:2")),
        ("topology.endpoints=a:1", ("a:1",)),
        ("topology.endpoints=[]", ()),
    ],
)
def test_values_are_what_they_look_like(flag: str, expected: object) -> None:
    key, _, value = flag.partition("=")
    section, name = key.split(".")
    for config in (load_config(None, {}, [flag]), load_config(None, {f"SAGELLM_{section}__{name}".upper(): value}, [])):
        assert getattr(getattr(config, section), name) == expected


def test_maps_are_filled_by_each_layer(tmp_path: Path) -> None:
    path = write(
        tmp_path, "kv: {tenants: {acme: {guaranteed: 0.5}, idle: {}}}\ngateway: {tenant_keys: {acme: [k.1]}}\n"
    )
    env = {"SAGELLM_KV__TENANTS__GUESTS__LIMIT": "0.2", "SAGELLM_KV__TENANTS": "{b: {limit: 0.1}}"}
    config = load_config(path, env, ["kv.tenants.acme.limit=0.6", "gateway.tenant_keys.b=[k2, k3]"])
    assert {name: (t.guaranteed, t.limit) for name, t in config.kv.tenants.items()} == {
        "acme": (0.5, 0.6),
        "idle": (0.0, 1.0),
        "guests": (0.0, 0.2),
        "b": (0.0, 0.1),
    }
    assert config.gateway.tenant_keys == {"acme": ("k.1",), "b": ("k2", "k3")}
    assert load_config(write(tmp_path, dump_config(config)), {}, []) == config
    assert load_config(path, {}, ["kv.tenants={}"]).kv.tenants == {}


def test_an_empty_file_and_empty_sections_are_fine(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), {}, []) == Config()
    assert load_config(write(tmp_path, "router:\nmodel: {}\n"), {}, []) == Config()


def test_variables_that_are_no_settings_pass() -> None:
    env = {"SAGELLM_HOME": "/h", "SAGELLM_CACHE": "/c", "SAGELLM_TEST_CLUSTER": "x", "PATH": "/bin"}
    assert load_config(None, env, []) == Config()


@pytest.mark.parametrize(
    ("text", "env", "flags", "expected"),
    [
        ("engine: {num_block: 3}", {}, [], r"engine\.num_block \(file .*sagellm\.yaml\): .*mean engine\.num_blocks\?"),
        ("", {"SAGELLM_ROUTER__MAXQUEUE": "1"}, [], r"router\.maxqueue \(environment SAGELLM_ROUTER__MAXQUEUE\): .*"),
        ("", {}, ["transport.backed=tcp"], r"transport\.backed \(flag .*\): .*mean transport\.backend\?"),
        ("nonsense: 1", {}, [], r"nonsense .*: unknown key; sections are cluster, model, .*"),
        ("", {"SAGELLM_FOO": "1"}, [], r"foo \(environment SAGELLM_FOO\): unknown key.*"),
        ("", {}, ["engine.device.index=1"], r"engine\.device\.index .*: unknown key.*"),
        ("transport: 3", {}, [], r"transport .*: is a section with keys of its own, but was given 3"),
        ("transport: {backend: glo}", {}, [], r"transport\.backend .*: 'glo' is not allowed, must be 'auto', 'tcp'.*"),
        ("", {}, ["decode.num_blocks=1"], r"decode\.num_blocks .*: 1 is not allowed, must be greater than .* to 4"),
        ("", {}, ["prefill.device=cuda"], r"prefill\.device .*: unknown key.*"),
        ("", {}, ["decode.kv_quant_bits=5"], r"decode\.kv_quant_bits .*: 5 is not allowed, must be 0, 4 or 8"),
        (
            "engine: {weights: int8}",
            {},
            ["decode.kv_quant_bits=8"],
            r".*decode: weights 'int8' needs kv_quant_bits 0, not 8.*",
        ),
        ("", {}, ["router.max_queue=0"], r"router\.max_queue .*: 0 is not allowed, must be greater than .* to 1"),
        ("", {}, ["router.max_queue="], r"router\.max_queue .*: '' is not allowed, must be a valid integer.*"),
        ("", {}, ["router.max_queue=[1"], r"router\.max_queue .*: '\[1' is no YAML value"),
        ("model: {path: null}", {}, [], r"model\.path .*: None is not allowed, must be a valid string"),
        ("topology: {endpoints: 'a:1'}", {}, [], r"topology\.endpoints .*: 'a:1' .*must be a list such as \[a, b\]"),
        ("kv: {tenants: {a: {limt: 1}}}", {}, [], r"kv\.tenants\.a\.limt \(file .*\): 1 is not allowed, .*"),
        ("kv: {tenants: 1}", {}, [], r"kv\.tenants \(file .*\): 1 is not allowed, must be a valid dictionary"),
        ("", {}, ["kv.tenants.a=1"], r"kv\.tenants\.a \(flag .*\): 1 is not allowed, must be .*"),
        ("", {}, ["transport"], r"flag 'transport': write section\.key=value.*"),
        ("", {}, ["=3"], r"flag '=3': write section\.key=value.*"),
        ("", {}, ["transport.timeout_s=.nan"], r"transport\.timeout_s .*: nan is not allowed, .*"),
    ],
)
def test_a_bad_setting_is_named_with_its_origin_and_what_is_allowed(
    tmp_path: Path, text: str, env: dict[str, str], flags: list[str], expected: str
) -> None:
    lines = problems(write(tmp_path, text), env, flags)
    assert lines[0] == "invalid configuration:"
    assert any(re.fullmatch(rf"  {expected}", line) for line in lines[1:]), lines


def test_all_problems_come_at_once_one_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "nonsense: 1\nrouter: {max_queue: 0}\n")
    lines = problems(path, {"SAGELLM_FOO": "1"}, ["transport.backend=glo"])
    assert {line.split()[0] for line in lines[1:]} == {"nonsense", "foo", "router.max_queue", "transport.backend"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold sections"),
        ("router: {max_queue: 1}\nrouter: {max_queue: 2}\n", "'router' stands twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, text), {}, [])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration .*absent.yaml"):
        load_config(tmp_path / "absent.yaml", {}, [])


def test_a_dump_reads_back(tmp_path: Path) -> None:
    config = load_config(None, {}, ["topology.endpoints=a:1", "cluster.name=5", "transport.backend=gloo"])
    assert load_config(write(tmp_path, dump_config(config)), {}, []) == config


def test_the_schema_describes_each_section() -> None:
    schema = config_schema()
    assert set(schema["properties"]) == set(yaml.safe_load(dump_config(Config())))


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [("engine", "patches", "'auto', 'off' or 'required'"), ("transport", "overlap", "'auto' or 'off'")],
)
def test_a_bare_off_is_what_it_says_though_yaml_reads_it_as_false(
    tmp_path: Path, section: str, key: str, known: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}: {{{key}: off}}")
    for config in (load_config(file, {}), load_config(None, {}, [f"{section}.{key}=off"])):
        assert getattr(getattr(config, section), key) == "off"
    with pytest.raises(ConfigError, match=rf"{section}\.{key} .* must be {known}"):
        load_config(None, {}, [f"{section}.{key}=maybe"])


def test_a_role_has_its_own_kv_over_the_engines() -> None:
    config = load_config(None, {}, ["engine.dtype=bfloat16", "engine.block_size_tokens=32", "decode.kv_quant_bits=8"])
    prefill, decode = (config.of_role(role).engine for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
    assert (prefill.dtype, prefill.kv_quant_bits, prefill.block_size_tokens) == ("bfloat16", 0, 32)
    assert (decode.dtype, decode.kv_quant_bits, decode.block_size_tokens) == ("bfloat16", 8, 32)
    assert config.of_role(WorkerRole.KV_STORE) == config


@pytest.mark.parametrize("name", transport_presets())
def test_each_preset_is_valid_and_explicit_keys_override_it(name: str) -> None:
    preset = transport_presets()[name]
    transport = load_config(None, {}, [f"transport.preset={name}"]).transport
    assert {key: getattr(transport, key) for key in preset} == preset
    assert transport.model_copy(update={"preset": ""}) != Config().transport
    own = load_config(None, {"SAGELLM_TRANSPORT__CHUNK_BYTES": "77"}, [f"transport.preset={name}"]).transport
    assert (own.chunk_bytes, own.pipeline_depth) == (77, transport.pipeline_depth)


def test_a_preset_survives_being_written_down(tmp_path: Path) -> None:
    config = load_config(None, {}, ["transport.preset=high-bw", "transport.chunk_bytes=77"])
    assert load_config(write(tmp_path, dump_config(config)), {}, []) == config


def test_an_unknown_preset_is_named() -> None:
    assert (
        "transport.preset (flag transport.preset=fast): 'fast' is not allowed"
        in problems(flags=["transport.preset=fast"])[1]
    )
