"""NVIDIA devices: the module ``sagellm._cuda``, what it lacks here, and a self-test."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

from sagellm.errors import DeviceUnavailableError, SagellmError


def load_cuda() -> ModuleType:
    """Imports ``sagellm._cuda``, which loads without a driver.

    Raises:
        DeviceUnavailableError: This install has none, or it does not load.
    """
    if importlib.util.find_spec("sagellm._cuda") is None:
        raise DeviceUnavailableError(
            "this install was built without CUDA; reinstall where nvcc 12.4 or newer is found "
            "(CMAKE_ARGS=-DSAGELLM_CUDA=ON makes its absence an error)"
        )
    try:
        return importlib.import_module("sagellm._cuda")
    except ImportError as error:
        raise DeviceUnavailableError(f"sagellm._cuda does not load ({error}); reinstall") from None


def probe_cuda(index: int) -> str:
    """Tells what device ``index`` is, after a product on it has come out right.

    Raises:
        DeviceUnavailableError: It cannot run the kernels; the message says why.
    """
    module = load_cuda()
    module.use_device(index)
    try:
        failure = self_test(module)
    except SagellmError as error:
        failure = str(error)
    if failure:
        raise DeviceUnavailableError(
            f"self-test on cuda:{index} failed: {failure}; check the driver with nvidia-smi, and "
            "that SAGELLM_CUDA_ARCHS of this build includes the device"
        )
    info = module.device_info(index)
    major, minor = info["compute_capability"]
    memory = info["total_bytes"] / 2**30
    return f"native kernels on {info['name']}, {major}.{minor}, {memory:.0f} GiB"


def cublas_folders() -> list[str]:
    """Folders of ``nvidia-cublas`` wheels, where the dynamic linker does not look."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of several wheels
    roots = spec.submodule_search_locations if spec is not None else None
    places = [Path(root) / part / "lib" for root in roots or () for part in ("cu13", "cublas")]
    return [str(place) for place in places if place.is_dir()]


def self_test(module: ModuleType) -> str | None:
    """Multiplies small bfloat16 matrices on the device; returns what is wrong, or None."""
    rng = np.random.default_rng(0)
    x, weights = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((3, 64), (40, 64)))
    out = module.empty([3, 40], np.dtype(np.float32))
    x_bits, weight_bits = ((a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, weights))
    module.gemm(module.array(x_bits), module.array(weight_bits), out)
    expected = np.einsum("mk,nk->mn", x, weights)  # small integers: exact in every format
    wrong = int(np.count_nonzero(out.numpy() != expected))
    return f"{wrong} of {expected.size} elements of a product are wrong" if wrong else None
