"""Runs kernel tests on a device where there is one, and on the emulator everywhere."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-emulation"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")


def _build_emulated(target: str) -> None:
    """Builds one target of the emulator; what is up to date costs a second."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches fibers with x86-64 instructions")
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the emulator is built with {' and '.join(missing)}, not found here")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run(
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, "-DCMAKE_BUILD_TYPE=Release"),
        *("-DSAGELLM_CUDA=OFF", "-DSAGELLM_CUDA_EMULATION=ON"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
    )
    _run("cmake", "--build", str(BUILD), "--target", target, "--parallel", str(os.cpu_count()))


def _folder(target: str) -> Path:
    """Where a target of the emulator lies: SAGELLM_CUDA_EMULATED names a folder built before."""
    if given := os.environ.get("SAGELLM_CUDA_EMULATED"):
        return Path(given)
    _build_emulated(target)
    return BUILD / "tests" / "cpp" / "cuda_emulation"


@functools.cache
def _emulated() -> ModuleType:
    return _load(next(_folder("_cuda_emulated").glob("_cuda_emulated*.so")))


def _hardware() -> ModuleType:
    module = pytest.importorskip("sagellm._cuda", reason="sagellm._cuda is not built")
    count, reason = module.probe()
    if count == 0:
        pytest.skip(reason)
    module.use_device(0)
    return module


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("emulated", marks=pytest.mark.build),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
def cuda(request: pytest.FixtureRequest) -> ModuleType:
    """The kernels' module: emulated, or sagellm._cuda on a device."""
    return _emulated() if request.param == "emulated" else _hardware()


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The emulated kernels, for what only they can tell; mark such tests ``build``."""
    return _emulated()


@pytest.fixture(scope="session")
def fake_cublas_folder() -> str:
    """A folder with a libcublasLt.so.13 that runs on the CPU."""
    return str(_folder("fake_cublas_lt"))


@pytest.fixture(scope="session")
def fake_nccl_folder() -> str:
    """A folder with a libnccl.so.2 that runs on the CPU."""
    return str(_folder("fake_nccl"))


@pytest.fixture
def orders(cuda: ModuleType) -> Iterator[range]:
    """Seeds to repeat a kernel with: other orders of threads in the emulator, once on a device."""
    yield range(3) if hasattr(cuda, "set_order") else range(1)
    if hasattr(cuda, "set_order"):
        cuda.set_order(0)
