from __future__ import annotations

import pytest

from sagellm_common.comm_backend.config import AT_RUN_TIME, Change, KVTransportConfig, check_depth
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError


def test_what_is_set_is_in_force_and_the_difference_is_told() -> None:
    settings = KVTransportConfig(TransportConfig(chunk_bytes=1024))
    settings.set({"chunk_bytes": "4096", "fusion": "off", "overlap_min_bytes": "null"})
    assert (settings.now.chunk_bytes, settings.now.fusion, settings.loaded.chunk_bytes) == (4096, "off", 1024)
    assert settings.changes() == [Change("chunk_bytes", "1024", "4096"), Change("fusion", "auto", "off")]
    assert settings.in_force()["chunk_bytes"] == "4096"
    assert settings.in_force()["overlap_min_bytes"] == "null"
    settings.set({"chunk_bytes": "1024", "fusion": "auto"})
    assert settings.changes() == []


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"chunk_byte": "1"}, r"no key 'chunk_byte'; did you mean chunk_bytes"),
        ({"nonsense": "1"}, r"no key 'nonsense'; known: wire_dtype, "),
        ({"backend": "gloo"}, r"transport\.backend cannot be changed while a worker runs"),
        ({"chunk_bytes": "-1"}, r"transport\.chunk_bytes: -1 is not allowed, .*greater than or equal to 0"),
        ({"chunk_bytes": "1", "fusion": "perhaps"}, r"transport\.fusion: 'perhaps' is not allowed, must be 'auto' or"),
        ({"chunk_bytes": "[1"}, r"no YAML value"),
    ],
)
def test_a_wrong_one_is_named_and_nothing_changes(wrong: dict[str, str], complaint: str) -> None:
    settings = KVTransportConfig(TransportConfig())
    with pytest.raises(ConfigError, match=complaint):
        settings.set(wrong)
    assert settings.now == TransportConfig()


def test_only_a_byte_path_with_buffers_has_a_depth() -> None:
    over_gloo = KVTransportConfig(TransportConfig(backend="gloo"))
    assert over_gloo.set({"pipeline_depth": "3"}).pipeline_depth == 3
    check_depth(TransportConfig(backend="gloo", pipeline_depth=3))
    check_depth(TransportConfig(backend="tcp"))
    check_depth(TransportConfig(backend="tcp", preset="high-bw", pipeline_depth=4))
    with pytest.raises(ConfigError, match=r"pipeline_depth: over 'shm' .* set chunk_bytes"):
        KVTransportConfig(TransportConfig(backend="shm")).set({"pipeline_depth": "3"})
    with pytest.raises(ConfigError, match=r"pipeline_depth: over 'tcp'"):
        check_depth(TransportConfig(backend="tcp", pipeline_depth=3))


def test_each_key_exists() -> None:
    assert set(AT_RUN_TIME) <= set(TransportConfig.model_fields)
