"""Whether and why the build leaves the module _cuda out: cmake/cuda.cmake, before it compiles."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cmake" / "cuda.cmake"

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake"),
]


@pytest.fixture
def old_nvcc(tmp_path: Path) -> Path:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    compiler.chmod(0o755)
    return compiler


def decide(setting: str, nvcc: Path, build_python: str = "ON") -> tuple[bool, str]:
    """Whether the configuration goes on, and what it says, in one line."""
    result = subprocess.run(
        [
            *("cmake", f"-DSAGELLM_CUDA={setting}", f"-DCMAKE_CUDA_COMPILER={nvcc}"),
            *(f"-DSAGELLM_BUILD_PYTHON={build_python}", "-P", str(SCRIPT)),
        ],
        capture_output=True,
        text=True,
    )
    return result.returncode == 0, " ".join((result.stdout + result.stderr).split())


def test_an_old_nvcc_is_passed_over_with_a_message(old_nvcc: Path) -> None:
    goes_on, text = decide("AUTO", old_nvcc)
    assert goes_on
    assert "no module _cuda" in text and "is CUDA 11.8; install 12.4 or newer" in text


def test_an_old_nvcc_is_an_error_where_cuda_was_asked_for(old_nvcc: Path) -> None:
    goes_on, text = decide("ON", old_nvcc)
    assert not goes_on
    assert "SAGELLM_CUDA=ON, but" in text and "-DCMAKE_CUDA_COMPILER=<nvcc>" in text


def test_a_compiler_that_does_not_run_is_an_error_where_cuda_was_asked_for(tmp_path: Path) -> None:
    goes_on, text = decide("ON", tmp_path / "absent")
    assert not goes_on and "--version failed; name a working nvcc" in text


def test_nothing_is_looked_for_where_cuda_is_off(old_nvcc: Path) -> None:
    assert decide("OFF", old_nvcc) == (True, "")
    assert decide("AUTO", old_nvcc, build_python="OFF") == (True, "")


@pytest.mark.parametrize(
    ("setting", "build_python", "says"),
    [("MAYBE", "ON", "possible are AUTO, ON and OFF"), ("ON", "OFF", "SAGELLM_BUILD_PYTHON=ON")],
)
def test_settings_that_cannot_be_met_are_errors(
    old_nvcc: Path, setting: str, build_python: str, says: str
) -> None:
    goes_on, text = decide(setting, old_nvcc, build_python)
    assert not goes_on and says in text
