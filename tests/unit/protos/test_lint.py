from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

PROTOS = Path(__file__).parents[3] / "protos"


@pytest.fixture(scope="module")
def lint() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proto_lint", PROTOS / "lint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def proto(**parts: Any) -> FileDescriptorProto:
    file = FileDescriptorProto(name="x/v1/a.proto", package="x.v1", syntax="proto3")
    file.MergeFrom(FileDescriptorProto(**parts))
    return file


def enum(name: str, *values: str, first: int = 0) -> dict[str, Any]:
    return {"name": name, "value": [{"name": v, "number": n} for n, v in enumerate(values, start=first)]}


def service(name: str, method: str, request: str, response: str) -> dict[str, Any]:
    return {
        "name": name,
        "method": [{"name": method, "input_type": f".x.v1.{request}", "output_type": f".x.v1.{response}"}],
    }


GOOD = proto(
    enum_type=[enum("WorkerRole", "WORKER_ROLE_UNSPECIFIED", "WORKER_ROLE_PREFILL")],
    message_type=[{"name": "GetThingRequest", "field": [{"name": "block_size_2", "number": 1, "type": 5, "label": 1}]}],
    service=[service("ThingService", "GetThing", "GetThingRequest", "Thing")],
)


def test_good_style_passes(lint: ModuleType) -> None:
    assert list(lint.style(GOOD)) == []


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (proto(package="y.v1"), "not its directory"),
        (proto(name="x/a.proto", package="x"), "no version"),
        (proto(syntax="proto2"), "not proto3"),
        (proto(enum_type=[enum("Role", "ROLE_A")]), "does not start with ROLE_UNSPECIFIED = 0"),
        (proto(enum_type=[enum("Role", "ROLE_UNSPECIFIED", first=1)]), "does not start with ROLE_UNSPECIFIED = 0"),
        (proto(enum_type=[enum("Role", "ROLE_UNSPECIFIED", "PREFILL")]), "lacks the prefix ROLE_"),
        (proto(message_type=[{"name": "kv_layout"}]), "not PascalCase"),
        (proto(message_type=[{"name": "A", "nested_type": [{"name": "b"}]}]), "not PascalCase"),
        (proto(message_type=[{"name": "A", "field": [{"name": "blockSize"}]}]), "not snake_case"),
        (proto(service=[service("Thing", "Do", "DoRequest", "DoResponse")]), "ending in Service"),
        (proto(service=[service("AService", "do", "DoRequest", "DoResponse")]), "not PascalCase"),
        (proto(service=[service("AService", "Do", "Thing", "DoResponse")]), "no …Request"),
        (proto(service=[service("AService", "Do", "DoRequest", "Thing")]), "no …Response"),
    ],
)
def test_bad_style_is_named(lint: ModuleType, file: FileDescriptorProto, complaint: str) -> None:
    (problem,) = lint.style(file)
    assert complaint in problem
    assert file.name in problem


@pytest.mark.parametrize(
    "change",
    [
        {"name": "block_size_2", "number": 2, "type": 5, "label": 1},
        {"name": "block_size_2", "number": 1, "type": 3, "label": 1},
        {"name": "block_size_2", "number": 1, "type": 5, "label": 3},
        {"name": "renamed", "number": 1, "type": 5, "label": 1},
    ],
)
def test_a_changed_field_is_another_element(lint: ModuleType, change: dict[str, Any]) -> None:
    changed = FileDescriptorProto.FromString(GOOD.SerializeToString())
    changed.message_type[0].field[0].CopyFrom(
        FileDescriptorProto(message_type=[{"field": [change]}]).message_type[0].field[0]
    )
    assert set(lint.elements(GOOD)) - set(lint.elements(changed)), "the old element must be missing"


def test_an_addition_keeps_every_element(lint: ModuleType) -> None:
    grown = FileDescriptorProto.FromString(GOOD.SerializeToString())
    grown.message_type[0].field.add(name="more", number=2, type=9, label=1)
    assert set(lint.elements(GOOD)) < set(lint.elements(grown))
    assert "field x.v1.GetThingRequest.more = 2 string" in set(lint.elements(grown))


def test_streams_are_part_of_the_contract(lint: ModuleType) -> None:
    streaming = FileDescriptorProto.FromString(GOOD.SerializeToString())
    streaming.service[0].method[0].server_streaming = True
    assert "rpc x.v1.ThingService/GetThing (x.v1.GetThingRequest) returns (stream x.v1.Thing)" in set(
        lint.elements(streaming)
    )
