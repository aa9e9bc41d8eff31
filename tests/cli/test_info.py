"""``sagellm info`` and ``sagellm version``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from types import ModuleType

import pytest

from cli.support import succeed
from sagellm.errors import DeviceUnavailableError


def test_version_is_that_of_the_package() -> None:
    assert succeed("version") == f"sagellm {importlib.metadata.version('sagellm')}\n"


def test_info_gives_a_reason_for_every_device() -> None:
    printed = succeed("info", "--json")
    assert printed.count("\n") == 1
    facts = json.loads(printed)
    assert facts["sagellm"] == importlib.metadata.version("sagellm")
    assert facts["cpus"] >= 1
    assert {"python", "numpy"} <= set(facts["versions"])
    devices = {device["name"]: device for device in facts["devices"]}
    assert {"cpu", "cuda", "ascend", "reference"} <= set(devices)
    assert devices["reference"]["available"] is True
    assert all(device["reason"] for device in devices.values())
    shown = " ".join(succeed("info").split())
    for device in devices.values():
        assert device["reason"] in shown


@pytest.mark.native
def test_info_shows_the_instruction_set_in_use() -> None:
    facts = json.loads(succeed("info", "--json", SAGELLM_CPU_ISA="generic"))
    assert facts["isa path"] == "generic"
    assert "generic" in facts["isa paths that run here"]
    assert isinstance(facts["cpu features"], list)


def test_info_shows_nccl_where_there_are_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    info = importlib.import_module("sagellm.cli.info")

    def raising(message: str) -> None:
        raise DeviceUnavailableError(message)

    monkeypatch.setattr(info, "load_cuda", lambda: raising("built without CUDA"))
    assert "nccl" not in info.collect()
    monkeypatch.setattr(info, "load_cuda", lambda: ModuleType("sagellm._cuda"))
    monkeypatch.setattr(info, "describe_nccl", lambda module: "2.28.9, libnccl.so.2")
    assert info.collect()["nccl"] == "2.28.9, libnccl.so.2"
    monkeypatch.setattr(info, "describe_nccl", lambda module: raising("NCCL was not found; get it"))
    assert info.collect()["nccl"] == "NCCL was not found; get it"
