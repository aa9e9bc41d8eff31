"""``sagellm info`` and ``sagellm version``."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from cli.support import succeed


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
