"""Loads the configuration: defaults ← preset ← YAML file ← SAGELLM_* environment ← flags, each over the last.

A key that nobody knows is an error wherever it stands, for it is a typing error more often than not.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError

ENV_PREFIX = "SAGELLM_"
NOT_SETTINGS = frozenset(
    {
        "SAGELLM_HOME",
        "SAGELLM_CACHE",
        "SAGELLM_FAILPOINTS",
        "SAGELLM_TEST_CLUSTER",
        "SAGELLM_TEST_FAULT_TIMES",
        "SAGELLM_TEST_LONG",
    }
)
"""Variables of ours that are no settings: where files are kept, and the tests' switches."""

PRESETS = Path(__file__).with_name("presets.yaml")

Key = tuple[str, ...]


def load_config(path: Path | None, env: Mapping[str, str], overrides: Sequence[str] = ()) -> Config:
    """The configuration, or a ConfigError with one line for each problem.

    `env` may hold SAGELLM_SECTION__KEY; `overrides` are "section.key=value". Both parse values as YAML, so `true`
    and `3` are what they look like; text stays as it is, and a list may be written `a,b` as well as `[a, b]`.
    """
    problems: list[str] = []
    values: dict[Key, Any] = {}
    origins: dict[Key, str] = {}
    layers = [
        *([(f"file {path}", _from_file(path))] if path else []),
        *_from_env(env, problems),
        *_from_overrides(overrides, problems),
    ]
    for origin, tree in layers:
        for key, value in _leaves(tree):
            if problem := _unknown(key, value):
                problems.append(f"{'.'.join(key)} ({origin}): {problem}")
                continue
            for other in [k for k in values if k != key and k[: len(key)] == key[: len(k)]]:
                del values[other], origins[other]  # `kv.tenants.acme.limit` over `kv.tenants: {}`, and the reverse
            values[key], origins[key] = value, origin
    _add_preset(values, origins)
    try:
        config = Config.model_validate(_tree(values))
    except ValidationError as err:
        problems += [_describe(dict(e), origins) for e in err.errors()]
    if problems:
        raise ConfigError("invalid configuration:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def dump_config(config: Config) -> str:
    """As YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_schema() -> dict[str, Any]:
    """The JSON schema, with defaults and descriptions."""
    return Config.model_json_schema()


def transport_presets() -> dict[str, dict[str, Any]]:
    """name → keys of the section `transport` and their values."""
    presets: dict[str, dict[str, Any]] = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    return presets


# ---- sources ----


def _add_preset(values: dict[Key, Any], origins: dict[Key, str]) -> None:
    """Below everything that was said. An unknown name is left to the validation."""
    name = values.get(("transport", "preset"))
    for setting, value in transport_presets().get(str(name), {}).items():
        key = ("transport", setting)
        if key not in values:
            values[key], origins[key] = value, f"preset {name}"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"cannot read the configuration {path}: {err}") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{path} is not valid YAML: {err}") from err
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'transport:', but holds a {type(tree).__name__}")
    return tree


def _from_env(env: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or name in NOT_SETTINGS:
            continue
        origin = f"environment {name}"
        key = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        yield origin, _tree({key: _value(key, env[name], origin, problems)})


def _from_overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            problems.append(f"flag {text!r}: write section.key=value, such as transport.backend=gloo")
            continue
        key = tuple(name.strip().split("."))
        origin = f"flag {text}"
        yield origin, _tree({key: _value(key, value, origin, problems)})


def _value(key: Key, text: str, origin: str, problems: list[str]) -> Any:
    wanted = _annotation(key)
    if wanted is str or not text or all(isinstance(choice, str) for choice in get_args(wanted) or [None]):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"{'.'.join(key)} ({origin}): {text!r} is no YAML value")
        return None
    if get_origin(wanted) is tuple and not isinstance(value, list):
        return [part.strip() for part in text.split(",")]
    return value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# ---- keys ----


def _leaves(tree: Mapping[Any, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(key, value) of each setting. An empty section (`router:` with nothing below it) has none.

    A setting that is a map, such as kv.tenants, has one for each value in it: layers add to what others say.
    """
    for name, value in tree.items():
        key = (*above, str(name))
        if value == {} and _in_map(key):
            yield key, {}
        elif isinstance(value, Mapping) or (value is None and _is_section(_annotation(key))):
            yield from _leaves(value or {}, key)
        else:
            yield key, value


def _tree(values: Mapping[Key, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = value
    return tree


def _annotation(key: Key) -> Any:
    """The type of a section or setting; None for an unknown key."""
    model: Any = Config
    for name in key:
        field = model.model_fields.get(name) if _is_section(model) else None
        if field is None:
            return None
        model = field.annotation
    return model


def _in_map(key: Key) -> bool:
    """Whether the key is a setting that is a map, or something within one."""
    return any(get_origin(_annotation(key[:n])) is dict for n in range(1, len(key) + 1))


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _known_keys() -> list[str]:
    return [".".join(key) for key in _settings(Config)]


def _settings(section: type[BaseModel], above: Key = ()) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _settings(field.annotation, (*above, name))
        else:
            yield (*above, name)


def _unknown(key: Key, value: Any) -> str | None:
    """What is wrong with a key, and the nearest one that exists; None for a known one."""
    dotted = ".".join(key)
    if dotted in _known_keys() or _in_map(key):
        return None
    if _is_section(_annotation(key)):
        return f"is a section with keys of its own, but was given {value!r}"
    if near := difflib.get_close_matches(dotted, _known_keys(), n=1, cutoff=0.5):
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; sections are {', '.join(Config.model_fields)}"


def _describe(error: dict[str, Any], origins: Mapping[Key, str]) -> str:
    """One line for one pydantic error: key, origin, value, what is allowed."""
    location = tuple(str(part) for part in error["loc"])
    origin = next((o for key, o in origins.items() if location[: len(key)] == key), "default")
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("a valid tuple", "a list such as [a, b]")
    return f"{'.'.join(location)} ({origin}): {error['input']!r} is not allowed, {message}"
