"""Probes against recorded machines, and against tools that fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sagellm_common.comm_backend.hardware import PROBES, probe_all, select_device
from sagellm_common.comm_backend.hardware.host import Host, LocalHost, ToolRun
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind
from sagellm_common.core.errors import ConfigError
from tests.support.recorded_machines import (
    ASCEND,
    CAMBRICON,
    GIB,
    HYGON,
    KUNLUN,
    MIB,
    NVIDIA,
    RecordedHost,
    recorded,
)


def probed(kind: DeviceKind, host: Host) -> CapabilityDescriptor:
    return PROBES[kind](host)


@pytest.mark.parametrize(
    ("kind", "host", "driver", "accelerators"),
    [
        (
            DeviceKind.CUDA,
            NVIDIA,
            "580.159.03",
            [
                Accelerator(0, "NVIDIA H200", 143771 * MIB, 143157 * MIB),
                Accelerator(1, "NVIDIA H200", 143771 * MIB, 70012 * MIB),
            ],
        ),
        (
            DeviceKind.ASCEND,
            ASCEND,
            "24.1.rc2",
            [
                Accelerator(0, "Ascend 910B3", 64 * GIB, 64 * GIB - 3363 * MIB),
                Accelerator(1, "Ascend 910B3", 64 * GIB, 64 * GIB - 59351 * MIB),
            ],
        ),
        (
            DeviceKind.ASCEND,
            RecordedHost({"npu-smi info": recorded("npu-smi.910-two-chips.txt")}),
            "26.0.rc2",
            [
                Accelerator(0, "Ascend 910", 64 * GIB, 64 * GIB - 3419 * MIB),
                Accelerator(1, "Ascend 910", 64 * GIB, 64 * GIB - 2874 * MIB),
            ],
        ),
        (
            DeviceKind.ASCEND,
            RecordedHost({"npu-smi info": recorded("npu-smi.310p3.txt")}),
            "23.0.3",
            [Accelerator(0, "Ascend 310P3", 21527 * MIB, (21527 - 1851) * MIB)],
        ),
        (
            DeviceKind.CAMBRICON,
            CAMBRICON,
            "5.10.22",
            [
                Accelerator(0, "MLU370-X8", 42396 * MIB, 42396 * MIB),
                Accelerator(1, "MLU370-X8", 42396 * MIB, 2396 * MIB),
            ],
        ),
        (
            DeviceKind.CAMBRICON,
            RecordedHost({"cnmon": recorded("cnmon.mlu370-v4.txt")}),
            "4.20.11",
            [Accelerator(0, "MLU370-X4", 23308 * MIB, 23308 * MIB)],
        ),
        (
            DeviceKind.HYGON,
            HYGON,
            "6.3.8-V1.9.2",
            [
                Accelerator(0, "Hygon K100_AI", 65520 * MIB, 65518 * MIB),
                Accelerator(1, "Hygon K100_AI", 65520 * MIB, 13600 * MIB),
            ],
        ),
        (
            DeviceKind.HYGON,
            RecordedHost({"rocm-smi --show": recorded("hy-smi.z100.txt")}),
            "6.2.26",
            [Accelerator(0, "Hygon Z100SM", 16368 * MIB, 16356 * MIB)],
        ),
        (
            DeviceKind.KUNLUN,
            KUNLUN,
            "515.58",
            [
                Accelerator(0, "Kunlunxin P800 OAM", 98304 * MIB, (98304 - 1536) * MIB),
                Accelerator(1, "Kunlunxin P800 OAM", 98304 * MIB, (98304 - 91204) * MIB),
            ],
        ),
        (DeviceKind.CPU, RecordedHost(), "", None),
    ],
)
def test_reads_what_the_tools_print(
    kind: DeviceKind, host: RecordedHost, driver: str, accelerators: list[Accelerator] | None
) -> None:
    found = probed(kind, host)
    assert (found.kind, found.driver_version) == (kind, driver)
    if accelerators is None:
        assert found.accelerators[0].memory_total_bytes == 64 * GIB
    else:
        assert list(found.accelerators) == accelerators


@pytest.mark.parametrize(
    ("kind", "host", "lmdeploy"),
    [
        (DeviceKind.CPU, RecordedHost(), "cpu"),
        (DeviceKind.CUDA, NVIDIA, "cuda"),
        (DeviceKind.ASCEND, ASCEND, "ascend"),
        (DeviceKind.CAMBRICON, CAMBRICON, "camb"),
    ],
)
def test_what_lmdeploy_serves_is_usable(kind: DeviceKind, host: RecordedHost, lmdeploy: str) -> None:
    found = select_device(kind.value, host)
    assert (found.missing, found.lmdeploy_device_type) == ((), lmdeploy)
    assert found.dtypes
    assert 0 in found.kv_quant_bits
    assert "tcp" in found.transport.byte_paths


def test_names_are_those_that_lmdeploy_takes() -> None:
    """Its configuration refuses others; `cpu` is our plug-in's."""
    from lmdeploy.messages import PytorchEngineConfig

    for kind in DeviceKind:
        known = probed(kind, RecordedHost()).lmdeploy_device_type
        if known in ("", "cpu"):
            continue
        assert PytorchEngineConfig(device_type=known).device_type == known
        for dtype in probed(kind, RecordedHost()).dtypes:
            PytorchEngineConfig(device_type=known, dtype=dtype)
    with pytest.raises(AssertionError, match="invalid device_type"):
        PytorchEngineConfig(device_type="rocm")


@pytest.mark.parametrize(
    ("kind", "host", "complaints"),
    [
        (DeviceKind.CUDA, RecordedHost(torch="cuda", packages=["triton"]), ["no device node /dev/nvidia.*driver"]),
        (
            DeviceKind.CUDA,
            RecordedHost(NVIDIA.tools, NVIDIA.paths),
            ["package triton is not installed", "torch is built for cpu, not for CUDA"],
        ),
        (
            DeviceKind.CUDA,
            RecordedHost(paths=["/dev/nvidia0"], packages=["triton"], torch="cuda"),
            ["nvidia-smi is not on PATH, although there is /dev/nvidia0"],
        ),
        (
            DeviceKind.CUDA,
            RecordedHost(
                {"nvidia-smi": ToolRun("", "nvidia-smi failed with exit code 18: Driver/library version mismatch")},
                ["/dev/nvidia0"],
                ["triton"],
                "cuda",
            ),
            ["exit code 18: Driver/library version mismatch"],
        ),
        (DeviceKind.ASCEND, RecordedHost(), ["/dev/davinci", "package torch_npu", "package dlinfer"]),
        (DeviceKind.ASCEND, RecordedHost(ASCEND.tools), ["torch_npu", "dlinfer-ascend"]),
        (
            DeviceKind.ASCEND,
            RecordedHost({"npu-smi info": ToolRun("", "npu-smi did not answer within 10 s")}, ["/dev/davinci0"]),
            ["npu-smi did not answer within 10 s"],
        ),
        (DeviceKind.CAMBRICON, RecordedHost(), ["/dev/cambricon", "torch_mlu", "dlinfer"]),
        (DeviceKind.HYGON, HYGON, ["no device_type for Hygon DCU"]),
        (DeviceKind.HYGON, RecordedHost(), ["/dev/mkfd", "no device_type for Hygon DCU"]),
        (DeviceKind.KUNLUN, KUNLUN, ["no device_type for Kunlunxin XPU"]),
        (DeviceKind.KUNLUN, RecordedHost(), ["/dev/xpu", "no device_type"]),
    ],
)
def test_what_is_missing_is_named(kind: DeviceKind, host: RecordedHost, complaints: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        select_device(kind.value, host)
    assert caught.value.message.startswith(f"engine.device: {kind.value!r} cannot be used here: ")
    for complaint in complaints:
        assert re.search(complaint, caught.value.message), caught.value.message


def test_other_vendors_tools_of_the_same_name_are_not_mistaken() -> None:
    amd = RecordedHost({"rocm-smi --show": recorded("rocm-smi.mi300x.txt")}, ["/dev/kfd"])
    intel = RecordedHost({"xpu-smi -m": recorded("xpu-smi.intel.txt")})
    assert not probed(DeviceKind.HYGON, amd).present
    assert not probed(DeviceKind.KUNLUN, intel).present


def test_before_ampere_there_is_no_bfloat16() -> None:
    volta = RecordedHost({**NVIDIA.tools, "nvidia-smi --query-gpu=compute_cap": "7.0\n9.0\n"}, (), ["triton"], "cuda")
    assert probed(DeviceKind.CUDA, volta).dtypes == ("float16",)
    assert probed(DeviceKind.CUDA, NVIDIA).dtypes == ("bfloat16", "float16")


@pytest.mark.parametrize(
    ("host", "chosen", "said"),
    [
        (RecordedHost(), DeviceKind.CPU, ""),
        (NVIDIA, DeviceKind.CUDA, ""),
        (ASCEND, DeviceKind.ASCEND, ""),
        (
            RecordedHost(NVIDIA.tools, NVIDIA.paths, ["triton"], "cpu"),
            DeviceKind.CPU,
            "passes over cuda: torch is built",
        ),
        (KUNLUN, DeviceKind.CPU, "passes over kunlun: LMDeploy"),
    ],
)
def test_auto_takes_what_works_and_says_what_does_not(
    host: RecordedHost, chosen: DeviceKind, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert select_device("auto", host).kind is chosen
    assert said in caplog.text
    assert ("passes over" in caplog.text) is bool(said)


def test_every_kind_is_probed_in_order() -> None:
    assert [device.kind for device in probe_all(RecordedHost())] == list(DeviceKind)


# ---- the tools themselves ----


def tool(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = directory / "some-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo fine", ToolRun("fine\n")),
        ("echo out; echo broken >&2; exit 9", ToolRun("out\n", "some-smi failed with exit code 9: broken")),
        ("exit 1", ToolRun("", "some-smi failed with exit code 1: it said nothing")),
        ("exec sleep 60", ToolRun("", "some-smi did not answer within 0.2 s")),
        ("printf '\\377\\n'", ToolRun("\N{REPLACEMENT CHARACTER}\n")),
    ],
)
def test_a_tool_may_fail_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: ToolRun
) -> None:
    tool(tmp_path, script, monkeypatch)
    if "sleep" in script:
        monkeypatch.setattr("sagellm_common.comm_backend.hardware.host.TOOL_TIMEOUT_S", 0.2)
    assert LocalHost().run("some-smi") == expected


def test_no_tool_is_no_failure() -> None:
    assert LocalHost().run("no-such-smi") is None


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = LocalHost()
    total, available = host.memory_bytes()
    assert 0 < available <= total
    assert host.has_package("torch")
    assert not host.has_package("no_such_package")
    import torch

    assert host.torch_build() == ("cuda" if torch.version.cuda else "hip" if torch.version.hip else "cpu")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("cuda: str | None = '13.0'\nhip: str | None = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "torch")
    assert host.torch_build() == "cuda"
