"""Rules of the wire contract, and that it only grows.

Every element of the protos is one line of `protos/contract.txt`. A line that vanishes is a broken peer and fails;
a new line is recorded by `make proto` (`--update`), which never removes one. A deliberate break is made by hand there,
where review sees it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

PROTOS = Path(__file__).resolve().parent
CONTRACT = PROTOS / "contract.txt"

SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record additions in contract.txt")
    update = parser.parse_args().update
    files = compile_protos()
    problems = [problem for file in files for problem in style(file)]
    now = {line for file in files for line in elements(file)}
    before = set(CONTRACT.read_text().splitlines()) if CONTRACT.exists() else set()
    problems += [f"breaks peers, was in {CONTRACT.name}: {line}" for line in sorted(before - now)]
    if update:
        CONTRACT.write_text("".join(f"{line}\n" for line in sorted(before | now)))
    else:
        problems += [f"not in {CONTRACT.name}, run `make proto`: {line}" for line in sorted(now - before)]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def compile_protos(root: Path = PROTOS) -> list[FileDescriptorProto]:
    """Descriptors of all files below `root`/sagellm. Raises SystemExit when they do not compile."""
    from generate import include_flags
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "set.binpb"
        sources = sorted(str(path) for path in (root / "sagellm").rglob("*.proto"))
        if protoc.main(["protoc", *include_flags(root), f"--descriptor_set_out={out}", *sources]):
            raise SystemExit("protoc failed")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


# ---- style: what `buf lint` calls STANDARD, as far as this project uses protos ----


def style(file: FileDescriptorProto) -> Iterator[str]:
    if file.package != str(Path(file.name).parent).replace("/", "."):
        yield f"{file.name}: package {file.package!r} is not its directory"
    if not re.search(r"\.v\d+$", file.package):
        yield f"{file.name}: package {file.package!r} has no version"
    if file.syntax != "proto3":
        yield f"{file.name}: syntax is {file.syntax or 'proto2'}, not proto3"
    for enum in file.enum_type:
        yield from enum_style(file.name, enum)
    for message in file.message_type:
        yield from message_style(file.name, message)
    for service in file.service:
        yield from service_style(file.name, service)


def enum_style(where: str, enum: EnumDescriptorProto) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
    for value in enum.value:
        if not value.name.startswith(f"{prefix}_"):
            yield f"{where}: {enum.name}.{value.name} lacks the prefix {prefix}_"
    if (enum.value[0].number, enum.value[0].name) != (0, f"{prefix}_UNSPECIFIED"):
        yield f"{where}: {enum.name} does not start with {prefix}_UNSPECIFIED = 0"


def message_style(where: str, message: DescriptorProto) -> Iterator[str]:
    if not PASCAL.fullmatch(message.name):
        yield f"{where}: message {message.name} is not PascalCase"
    for field in message.field:
        if not SNAKE.fullmatch(field.name):
            yield f"{where}: {message.name}.{field.name} is not snake_case"
    for enum in message.enum_type:
        yield from enum_style(f"{where}: {message.name}", enum)
    for nested in message.nested_type:
        if not nested.options.map_entry:
            yield from message_style(f"{where}: {message.name}", nested)


def service_style(where: str, service: ServiceDescriptorProto) -> Iterator[str]:
    if not (PASCAL.fullmatch(service.name) and service.name.endswith("Service")):
        yield f"{where}: service {service.name} is not PascalCase ending in Service"
    for method in service.method:
        name = f"{where}: {service.name}.{method.name}"
        request, response = (type_name.rsplit(".", 1)[1] for type_name in (method.input_type, method.output_type))
        if not PASCAL.fullmatch(method.name):
            yield f"{name} is not PascalCase"
        if not request.endswith("Request"):
            yield f"{name} takes {request}, which is no …Request"
        # Get and Watch answer with the resource itself.
        if not response.endswith("Response") and not method.name.startswith(("Get", "Watch")):
            yield f"{name} returns {response}, which is no …Response"


# ---- the contract as lines ----


def elements(file: FileDescriptorProto) -> Iterator[str]:
    """One line per thing a peer relies on: numbers, names and types; not comments, files or order."""
    for enum in file.enum_type:
        yield from enum_elements(file.package, enum)
    for message in file.message_type:
        yield from message_elements(file.package, message)
    for service in file.service:
        for method in service.method:
            request = "stream " * method.client_streaming + method.input_type.lstrip(".")
            response = "stream " * method.server_streaming + method.output_type.lstrip(".")
            yield f"rpc {file.package}.{service.name}/{method.name} ({request}) returns ({response})"


def enum_elements(scope: str, enum: EnumDescriptorProto) -> Iterator[str]:
    for value in enum.value:
        yield f"enum {scope}.{enum.name}.{value.name} = {value.number}"


def message_elements(scope: str, message: DescriptorProto) -> Iterator[str]:
    scope = f"{scope}.{message.name}"
    yield f"message {scope}"
    for field in message.field:
        label = "repeated " if field.label == FieldDescriptorProto.LABEL_REPEATED else ""
        label += "optional " * field.proto3_optional
        kind = field.type_name.lstrip(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        oneof = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            oneof = f" in oneof {message.oneof_decl[field.oneof_index].name}"
        yield f"field {scope}.{field.name} = {field.number} {label}{kind}{oneof}"
    for enum in message.enum_type:
        yield from enum_elements(scope, enum)
    for nested in message.nested_type:
        yield from message_elements(scope, nested)


if __name__ == "__main__":
    raise SystemExit(main())
