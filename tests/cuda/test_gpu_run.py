"""What runs on a GPU machine in one command: that it goes on after failures, shown without one."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu import run_tests

SCRIPT = Path(__file__).resolve().parents[1] / "gpu" / "run_all.sh"


@pytest.mark.build
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("bash", "cmake", "c++", "timeout")),
    reason="needs bash, cmake, c++ and timeout",
)
def test_a_failed_self_test_does_not_end_the_run(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHON": sys.executable,
            "SAGELLM_BUILD": str(tmp_path / "build"),
            "SAGELLM_CUDA_ARCHS": "90a-real",
            "SAGELLM_STEPS": "none",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert result.returncode == 1
    assert "FAILED: the self-test" in result.stdout
    assert f"done; results in {tmp_path / 'out'}" in result.stdout
    machine = (tmp_path / "out" / "machine.txt").read_text()
    assert "cmake: " in machine and "DeviceUnavailableError: " in machine


class Heard(subprocess.Popen[str]):
    """A process whose time begins when it has said something: starting takes what it takes."""

    def communicate(self, input: str | None = None, timeout: float | None = None) -> Any:
        select.select([self.stdout], [], [])
        return super().communicate(input, timeout)


def test_every_test_function_has_its_own_outcome(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = """
import sys, time
print("it says", sys.argv[-1])
if sys.argv[-1] == "slow":
    sys.stdout.flush()
    time.sleep(60)
sys.exit(sys.argv[-1] == "bad")
"""
    monkeypatch.setattr(run_tests, "PYTEST", (sys.executable, "-c", program))
    monkeypatch.setattr(subprocess, "Popen", Heard)
    end = time.monotonic() + 50
    outcomes = [
        run_tests.run("good", 30, end),
        run_tests.run("bad", 30, end),
        run_tests.run("slow", 2, end),
        run_tests.run("late", 30, time.monotonic()),
    ]
    run_tests.write(tmp_path, outcomes, "a file that does not load")
    content = json.loads((tmp_path / "tests.json").read_text())
    assert [test["status"] for test in content["tests"]] == [
        "passed",
        "failed",
        "stopped",
        "not run",
    ]
    text = (tmp_path / "tests.txt").read_text()
    assert "a file that does not load" in text
    assert "======== bad\nit says bad" in text and "======== slow\nit says slow" in text
    assert "======== good" not in text
