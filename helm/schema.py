"""Writes sagellm/values.schema.json: what the chart's own values may be, and under `config` the services' schema.

python -m helm.schema [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagellm_common.core.config_loader import config_schema

PATH = Path(__file__).parent / "sagellm" / "values.schema.json"
Schema = dict[str, Any]

CHARTS_OWN = (
    ("cluster",),
    ("model",),
    ("topology",),
    ("router", "address"),
    ("gateway", "api_keys"),
    ("gateway", "tenant_keys"),
    ("autoscaler", "mode"),
    ("autoscaler", "routers"),
    ("autoscaler", "namespace"),
    ("autoscaler", "prefill_target"),
    ("autoscaler", "decode_target"),
    ("autoscaler", "pool_target"),
    ("autoscaler", "lease"),
    *(("autoscaler", f"{end}_{phase}") for end in ("min", "max") for phase in ("prefill", "decode")),
    ("kv_store", "enabled"),
    ("kv_store", "stores"),
    ("kv_store", "disk", "path"),
)
"""Settings that follow from other values, or are secrets: not to be set under `config`."""


NOT_OF_ETCD = ("drainSeconds", "addCapabilities", "volumes", "volumeMounts", "initContainers")


def values_schema() -> Schema:
    config, definitions = _config()
    part = _part()
    starts = {"startSeconds": _integer(1, "in which it must have begun to serve")}
    scaled = {"hpa": _hpa()}
    worker = part | starts | scaled | {"maxUnavailable": _pods(), "maxSurge": _pods()}
    monitor = _object(
        {
            "enabled": {"type": "boolean"},
            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
            "labels": _texts(),
        }
    )
    definitions |= {
        "quantities": _object({}, _quantity()),
        "peers": _list({"type": "object"}),
        "worker": _object(worker),
        "volume": _volume(),
        "config": config,
        "monitor": monitor,
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the sageLLM chart",
        **_object(
            {
                "image": _object(
                    {
                        "repository": _text(1),
                        "tag": _text(),
                        "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
                        "pullSecrets": _list(_text(1)),
                    }
                ),
                "model": _object(
                    {"path": _text(), "name": _text(), "mountPath": _absolute(), "volume": _ref("volume")}
                ),
                "models": _models(),
                "config": _ref("config"),
                "routeKeySecret": _text(),
                "kvTopologyKey": _text(),
                "portBase": _integer(1024, "see SagePorts") | {"maximum": 64000},
                "sharedMemory": _quantity(),
                "router": _object(part | scaled | {"replicas": _integer(1)}),
                "gateway": _object(
                    part
                    | scaled
                    | {
                        "replicas": _integer(1),
                        "apiKeysSecret": _text(),
                        "service": _object(
                            {
                                "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                                "port": _integer(1) | {"maximum": 65535},
                                "annotations": _texts(),
                            }
                        ),
                    }
                ),
                "prefill": _ref("worker"),
                "decode": _ref("worker"),
                "kvStore": _object(part | starts | {"disk": _object({"size": _size(), "storageClass": _text()})}),
                "autoscaler": _object(
                    part
                    | {
                        "enabled": {"type": "boolean"},
                        "scaledBy": {"enum": ["autoscaler", "keda", "hpa"]},
                        "bounds": _object({phase: _bounds() for phase in ("prefill", "decode")}),
                    }
                ),
                "etcd": _object(
                    {name: rule for name, rule in part.items() if name not in NOT_OF_ETCD}
                    | {
                        "replicas": {"enum": [0, 1, 3, 5]},
                        "endpoints": _list({"type": "string", "pattern": "^[^/ ]+:[0-9]+$"}),
                        "storage": _size(),
                        "storageClass": _text(),
                    }
                ),
                "topologySpread": _list(
                    _object(
                        {
                            "topologyKey": _text(1),
                            "maxSkew": _integer(1),
                            "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
                        }
                    )
                    | {"required": ["topologyKey", "maxSkew", "whenUnsatisfiable"]}
                ),
                "podMonitor": _ref("monitor"),
                "serviceMonitor": _ref("monitor"),
                "dashboards": _object({"enabled": {"type": "boolean"}, "labels": _texts(), "annotations": _texts()}),
                "networkPolicy": _object(
                    {"enabled": {"type": "boolean"}}
                    | {name: {"$ref": "#/$defs/peers"} for name in ("clients", "routerClients", "monitoring")}
                ),
                # Helm's own: a chart that has this one as a part gives it these.
                "global": {"type": "object"},
            }
        ),
        "$defs": definitions,
    }


def _config() -> tuple[Schema, Schema]:
    """The schema of the services' configuration without what is the chart's, and the definitions it refers to."""
    schema = _untitled(config_schema())
    definitions = schema.pop("$defs")
    for *above, setting in CHARTS_OWN:
        section = schema
        for name in above:
            section = definitions[section["properties"][name]["$ref"].rpartition("/")[2]]
        del section["properties"][setting]
    used = json.dumps(schema | {"$defs": definitions})
    definitions = {name: rule for name, rule in definitions.items() if f'"#/$defs/{name}"' in used}
    return {**schema, "description": "sections of `sagellm config schema`"}, definitions


def _untitled(tree: Any) -> Any:
    """Without pydantic's titles, which repeat the names, and without defaults, which would be a second truth."""
    if isinstance(tree, Mapping):
        # A setting may be called `title`: then it is a schema, and stays.
        dropped = {
            name for name, value in tree.items() if name == "default" or (name == "title" and type(value) is str)
        }
        return {name: _untitled(value) for name, value in tree.items() if name not in dropped}
    return [_untitled(item) for item in tree] if isinstance(tree, list) else tree


def _part() -> Schema:
    """What every part may be told."""
    kubernetes = {"type": "object"}  # checked by the API server
    return {
        "replicas": _integer(0),
        "drainSeconds": _integer(1, "before it is stopped"),
        "resources": _object({name: {"$ref": "#/$defs/quantities"} for name in ("requests", "limits")}),
        "image": _text(),
        "nodeSelector": _texts(),
        "tolerations": _list(kubernetes),
        "affinity": kubernetes,
        "labels": _texts(),
        "annotations": _texts(),
        "serviceAccountAnnotations": _texts(),
        "priorityClassName": _text(),
        "runtimeClassName": _text(),
        "env": _list({"type": "object", "required": ["name"]}),
        "volumes": _list({"type": "object", "required": ["name"]}),
        "volumeMounts": _list({"type": "object", "required": ["name", "mountPath"]}),
        "initContainers": _list({"type": "object", "required": ["name"]}),
        "addCapabilities": _list(_text(1)),
    }


def _models() -> Schema:
    """By a short name, which becomes part of the names of objects."""
    model = {
        "path": _text(1),
        "name": _text(),
        "mountPath": _absolute(),
        "volume": _ref("volume"),
        "config": _ref("config"),
        "prefill": _ref("worker"),
        "decode": _ref("worker"),
    }
    short = {"pattern": "^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$"}
    return _object({}, _object(model) | {"required": ["path"]}) | {"propertyNames": short}


def _hpa() -> Schema:
    limits = {"min": _integer(1), "max": _integer(1), "cpuPercent": _integer(1)}
    own = {"metrics": _list({"type": "object", "required": ["type"]}), "behavior": {"type": "object"}}
    given = {
        "required": ["min", "max"],
        "anyOf": [{"required": ["cpuPercent"]}, {"required": ["metrics"]}],
    }
    return _object(limits | own) | {"anyOf": [{"maxProperties": 0}, given]}


def _volume() -> Schema:
    kinds = ("persistentVolumeClaim", "hostPath", "image", "nfs", "csi", "ephemeral", "emptyDir")
    return _object({kind: {"type": "object"} for kind in kinds}) | {"maxProperties": 1}


def _ref(definition: str) -> Schema:
    return {"$ref": f"#/$defs/{definition}"}


def _pods() -> Schema:
    """A number of pods, or a share of them."""
    return {"anyOf": [_integer(0), {"type": "string", "pattern": "^[0-9]+%$"}]}


def _object(properties: Schema, others: Schema | bool = False) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": others}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _text(min_length: int = 0) -> Schema:
    return {"type": "string"} | ({"minLength": min_length} if min_length else {})


def _texts() -> Schema:
    return _object({}, {"type": "string"})


def _absolute() -> Schema:
    return {"type": "string", "pattern": "^/."}


def _integer(minimum: int, description: str = "") -> Schema:
    return {"type": "integer", "minimum": minimum} | ({"description": description} if description else {})


def _bounds() -> Schema:
    return _list(_integer(1)) | {"minItems": 2, "maxItems": 2}


def _quantity() -> Schema:
    return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+([EPTGMk]i?|m)?$"}]}


def _size() -> Schema:
    return {"type": "string", "pattern": "^$|^[0-9]+([EPTGMk]i?)?$"}


def written() -> str:
    """The file as it should be."""
    return json.dumps(values_schema(), indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is as it should be")
    if not parser.parse_args().check:
        PATH.write_text(written())
    elif PATH.read_text() != written():
        print(f"{PATH} is out of date: run python -m helm.schema", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
