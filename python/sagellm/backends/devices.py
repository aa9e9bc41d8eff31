"""Finds out which devices can run here, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.backends.array_ops import ArrayOps
from sagellm.backends.cpu import CpuRunner
from sagellm.backends.cuda import CudaRunner, probe_cuda
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError
from sagellm.native import load_core

if TYPE_CHECKING:
    from sagellm.backends.interface import ModelRunner
    from sagellm.backends.reference import ReferenceRunner
    from sagellm.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cuda", "ascend", "cpu", "reference", "torch", "mock")
_INDEXED = ("cuda", "ascend")  # take :INDEX
_CUDA_OPTIONS = {"max_batch_tokens", "kv_dtype", "deterministic", "cublas"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """Whether a device can run here.

    Attributes:
        reason: What it will use when available; why it cannot run, and the remedy, when not.
    """

    name: str
    available: bool
    reason: str


def probe_devices() -> list[DeviceStatus]:
    """Probes every device, best first; no model is loaded on any of them."""
    return [_probe(name) for name in _PROBES]


def select_device(device: str = "auto") -> str:
    """Resolves ``auto`` to the best device that runs here; checks one that was named.

    Args:
        device: One of ``DEVICES``. ``ascend`` may carry an index, as in ``ascend:1``, and
            ``torch`` a torch device, as in ``torch:cuda:0``.

    Raises:
        InvalidArgumentError: An unknown device name.
        DeviceUnavailableError: The named device cannot run here; there is no fallback.
    """
    if device == "auto":
        return _best_device()
    name, index = _parse(device)
    if name == "mock":
        return device
    status = _probe(name, index)
    if not status.available:
        raise DeviceUnavailableError(f"device {device!r} cannot run here: {status.reason}")
    return device


def create_runner(checkpoint: Checkpoint, device: str = "auto", **options: Any) -> ModelRunner:
    """Loads ``checkpoint`` on ``device``.

    Args:
        checkpoint: An opened model.
        device: ``auto``, ``cuda`` or ``cuda:INDEX``, ``cpu``, ``reference`` (NumPy), ``ascend`` or
            ``ascend:INDEX`` (the reference backend on torch's ``npu``), ``torch`` or
            ``torch:DEVICE`` (the same on any torch device).
        **options: Options of the backend: ``threads``, ``max_batch_tokens``, ``precision``,
            ``isa``, ``kv_dtype`` for ``cpu``; ``max_batch_tokens``, ``kv_dtype``,
            ``deterministic``, ``cublas`` for ``cuda``. ``deterministic`` says nothing new to
            ``cpu``. Options that are None are left to the backend.

    Raises:
        InvalidArgumentError: An unknown device, or an option that the device does not have.
        DeviceUnavailableError: The device cannot run here.
    """
    chosen = select_device(device)
    given = {name: value for name, value in options.items() if value is not None}
    if chosen == "cpu":
        given.pop("deterministic", None)  # it is always so
        return CpuRunner(checkpoint, **given)
    name, _, rest = chosen.partition(":")
    if name == "cuda":
        for option in given.keys() - _CUDA_OPTIONS:
            raise InvalidArgumentError(f"device {chosen!r} has no option {option}; leave it out")
        return CudaRunner(checkpoint, device=int(rest or 0), **given)
    given.pop("max_batch_tokens", None)  # sizes the native core's workspace; others need none
    if given:
        raise InvalidArgumentError(
            f"device {chosen!r} has no option {', '.join(sorted(given))}; leave it out, or use "
            "device 'cpu'"
        )
    if name == "reference":
        return _reference_runner(checkpoint)
    if name == "ascend":
        return _reference_runner(checkpoint, array_namespace="torch", device=f"npu:{rest or 0}")
    if name == "torch":
        return _reference_runner(checkpoint, array_namespace="torch", device=rest or "cpu")
    raise InvalidArgumentError(
        "device 'mock' has no model files; build sagellm.backends.mock.MockRunner and hand it to "
        "Engine"
    )


def _reference_runner(checkpoint: Checkpoint, **options: str) -> ReferenceRunner:
    """A runner whose module only those load who run it."""
    module = importlib.import_module("sagellm.backends.reference")
    runner: ReferenceRunner = module.ReferenceRunner(checkpoint, **options)
    return runner


def _best_device() -> str:
    """The first device whose probe passes; logs one line with why the better ones are not it."""
    passed_over = ""
    for name in _PROBES:
        status = _probe(name)
        if status.available:
            logger.info("device %s: %s%s", name, status.reason, passed_over)
            return name
        cause = status.reason.partition(";")[0]  # the remedies are in `sagellm info`
        passed_over += f"; not {name}: {cause}"
    raise DeviceUnavailableError(f"no device can run here{passed_over}")


def _parse(device: str) -> tuple[str, int]:
    """Name and index of a device other than ``auto``."""
    name, colon, rest = device.partition(":")
    if name not in DEVICES:
        raise InvalidArgumentError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if not colon or (name == "torch" and rest):
        return name, 0
    if name not in _INDEXED or not (rest.isascii() and rest.isdigit()):
        form = f"{name}:INDEX, such as {name}:0" if name in _INDEXED else name
        raise InvalidArgumentError(f"device {device!r} is not of the form {form}")
    return name, int(rest)


def _probe(name: str, index: int = 0) -> DeviceStatus:
    """Runs the probe of one device. What it raises is the reason."""
    try:
        return DeviceStatus(name=name, available=True, reason=_PROBES[name](index))
    except DeviceUnavailableError as error:
        return DeviceStatus(name=name, available=False, reason=str(error))


def _probe_cuda(index: int) -> str:
    return probe_cuda(index)


def _probe_ascend(index: int) -> str:
    for package in ("torch", "torch_npu"):
        if not _is_installed(package):
            raise DeviceUnavailableError(
                f"{package} is not installed; install CANN, torch and the torch_npu that matches"
            )
    try:
        count = int(importlib.import_module("torch_npu").npu.device_count())
    except (ImportError, OSError, RuntimeError) as error:  # CANN or the driver is missing
        reason = str(error).partition("\n")[0]
        raise DeviceUnavailableError(
            f"torch_npu does not load: {reason}; source CANN's set_env.sh and check that driver, "
            "CANN, torch and torch_npu belong together"
        ) from error
    if index >= count:
        raise DeviceUnavailableError(
            f"torch_npu sees {count} devices, so there is no npu:{index}; check npu-smi and "
            "ASCEND_RT_VISIBLE_DEVICES"
        )
    try:
        failure = _self_test_torch(ArrayOps("torch", f"npu:{index}"))
    except RuntimeError as error:  # an operator that the device or its driver refuses
        failure = str(error).partition("\n")[0]
    if failure:
        raise DeviceUnavailableError(
            f"self-test on npu:{index} failed: {failure}; check that driver, CANN, torch and "
            "torch_npu belong together"
        )
    return f"reference backend on torch npu:{index}, {count} devices"


def _probe_cpu(index: int) -> str:
    core = load_core()
    isa = core.kernels.selected_isa()
    failure = _self_test_core(core, isa)
    if failure:
        raise DeviceUnavailableError(
            f"self-test failed: {failure}; force another path with SAGELLM_CPU_ISA, or use device "
            "'reference'"
        )
    return f"native kernels, {isa}"


def _probe_reference(index: int) -> str:
    return "NumPy, float32"


def _probe_torch(index: int) -> str:
    if not _is_installed("torch"):
        raise DeviceUnavailableError("torch is not installed; pip install 'sagellm[torch]'")
    return "reference backend on torch; name the device, as in torch:cpu"


_PROBES: dict[str, Callable[[int], str]] = {
    "cuda": _probe_cuda,
    "ascend": _probe_ascend,
    "cpu": _probe_cpu,
    "reference": _probe_reference,
    "torch": _probe_torch,
}  # best first


def _is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it: torch takes seconds."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _self_test_core(core: ModuleType, isa: str) -> str | None:
    """Multiplies a small Q8_0 matrix on the selected kernels; returns what is wrong, or None."""
    # No random numbers: this runs at every start, and NumPy loads their generators when asked.
    weights = np.sin(np.arange(16 * 64, dtype=np.float32)).reshape(16, 64)
    x = np.cos(np.arange(3 * 64, dtype=np.float32)).reshape(3, 64)
    raw = core.quant.quantize("Q8_0", weights)
    packed = core.quant.pack("Q8_0", raw, 16, 64)
    got = core.kernels.matmul(isa, packed, x, precision="a15")
    expected = np.einsum("tk,nk->tn", x, weights)  # `@` would start the threads of NumPy's BLAS
    error = float(np.abs(got - expected).max())
    return None if error < 0.1 else f"matmul differs from NumPy by {error:.3g}"


def _self_test_torch(ops: ArrayOps) -> str | None:
    """A small attention over paged keys on the device; returns what is wrong, or None."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((5, 64), (64, 64)))
    visible = np.tril(np.ones((5, 5), np.bool_))

    def attention(on: ArrayOps) -> Any:
        h = on.rms_norm(on.linear(on.array(x), on.array(weight)), on.array(weight[0]), 1e-6)
        pages = on.zeros((4, 2, 64))
        place = on.indices(np.array([3, 3, 1, 1, 2])), on.indices(np.array([0, 1, 0, 1, 0]))
        pages[place] = h
        scores = on.softcap(h @ pages[place].T * 0.125, 50.0)
        return on.activation("silu", on.softmax(scores, on.array(visible)) @ pages[place])

    got, expected = ops.numpy(attention(ops)), attention(ArrayOps("numpy"))
    error = float(np.abs(got - expected).max())
    return None if error < 0.02 else f"attention differs from NumPy by {error:.3g}"
