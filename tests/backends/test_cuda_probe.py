"""What the CUDA probe says about machines that this one is not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sagellm.backends import cuda, devices
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError


class FakeCuda(ModuleType):
    """A module with one device, whose product may be wrong or fail."""

    def __init__(self, *, off_by: float = 0.0, failure: Exception | None = None) -> None:
        super().__init__("sagellm._cuda")
        self.off_by = off_by
        self.failure = failure

    def use_device(self, index: int) -> None:
        if index > 0:
            raise DeviceUnavailableError(f"the NVIDIA driver shows 1 devices, so no cuda:{index}")

    def device_info(self, index: int) -> dict[str, Any]:
        return {"name": "NVIDIA Fake", "compute_capability": (9, 0), "total_bytes": 96 << 30}

    def array(self, source: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (source.astype(np.uint32) << 16).view(np.float32)

    def empty(self, shape: list[int], dtype: np.dtype[Any]) -> Any:
        values = np.full(shape, np.nan, dtype)
        return SimpleNamespace(values=values, numpy=lambda: values)

    def gemm(self, x: Any, weights: Any, out: Any) -> None:
        if self.failure:
            raise self.failure
        out.values[:] = x @ weights.T
        out.values[1, 2] += self.off_by


def use(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setattr(cuda, "load_cuda", lambda: module)


def test_a_device_whose_product_is_right_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda())
    assert cuda.probe_cuda(0) == "native kernels on NVIDIA Fake, 9.0, 96 GiB"


@pytest.mark.parametrize(
    ("module", "index", "reason"),
    [
        (FakeCuda(off_by=1.0), 0, "self-test on cuda:0 failed: 1 of 120 elements .* nvidia-smi"),
        (
            FakeCuda(failure=DeviceUnavailableError("cudaLaunchKernel: no kernel image")),
            0,
            "self-test on cuda:0 failed: cudaLaunchKernel: no kernel image; .*SAGELLM_CUDA_ARCHS",
        ),
        (FakeCuda(), 3, "so no cuda:3"),
    ],
)
def test_a_device_that_fails_says_how(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, index: int, reason: str
) -> None:
    use(monkeypatch, module)
    with pytest.raises(DeviceUnavailableError, match=reason):
        cuda.probe_cuda(index)


def test_an_install_without_the_module_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match=r"built without CUDA; reinstall where nvcc"):
        cuda.load_cuda()


def test_a_device_that_works_is_offered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda())
    assert devices.select_device("cuda:0") == "cuda:0"
    assert devices.select_device("auto") == "cuda"


def test_options_of_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda())
    checkpoint: Any = None  # not looked at
    with pytest.raises(InvalidArgumentError, match="'cuda:0' has no option threads; leave it out"):
        devices.create_runner(checkpoint, "cuda:0", threads=2)


def test_deterministic_reaches_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCuda())
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(devices, "CudaRunner", lambda checkpoint, **options: given.append(options))
    checkpoint: Any = None
    devices.create_runner(checkpoint, "cuda:0", deterministic=True, threads=None)
    devices.create_runner(checkpoint, "cuda", deterministic=None)
    assert given == [{"device": 0, "deterministic": True}, {"device": 0}]


def test_the_folders_of_the_cublas_wheels_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part in ("cu13", "cublas", "other"):
        (tmp_path / "nvidia" / part / "lib").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if re.match(r"nvidia(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert [Path(p).parts[-3:] for p in cuda.cublas_folders()] == [
        ("nvidia", "cu13", "lib"),
        ("nvidia", "cublas", "lib"),
    ]


@pytest.mark.native
def test_the_built_module_loads_without_a_driver_and_says_what_is_missing() -> None:
    module = pytest.importorskip("sagellm._cuda", reason="sagellm._cuda is not built")
    count, reason = module.probe()
    assert (count > 0) == (reason == "")
    if count == 0:
        assert ";" in reason  # cause; remedy
        with pytest.raises(DeviceUnavailableError, match=re.escape(reason)):
            module.use_device(0)


@pytest.mark.native
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_built_module_needs_no_cuda_library() -> None:
    module = pytest.importorskip("sagellm._cuda", reason="sagellm._cuda is not built")
    listed = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True)
    assert "libstdc++" in listed.stdout
    assert not re.search(r"libcu|libnv", listed.stdout), listed.stdout
