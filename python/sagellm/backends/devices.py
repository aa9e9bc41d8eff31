"""Finds out which devices can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.backends.cpu import CpuRunner
from sagellm.backends.reference import ReferenceRunner
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError
from sagellm.native import load_core

if TYPE_CHECKING:
    from sagellm.backends.interface import ModelRunner
    from sagellm.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "reference", "torch", "mock")


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
    """Probes every device, best first; nothing is loaded on any of them."""
    return [
        _probe_cpu(),
        DeviceStatus(name="reference", available=True, reason="NumPy, float32"),
        _probe_torch(),
    ]


def select_device(device: str = "auto") -> str:
    """Resolves ``auto`` to the best device that runs here; checks one that was named.

    Raises:
        InvalidArgumentError: An unknown device name.
        DeviceUnavailableError: The named device cannot run here; there is no fallback.
    """
    base = device.split(":", 1)[0]
    if base not in DEVICES:
        raise InvalidArgumentError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if device == "mock":
        return device
    statuses = {status.name: status for status in probe_devices()}
    if device == "auto":
        for status in statuses.values():
            if status.available:
                logger.info("device %s: %s", status.name, status.reason)
                return status.name
    status = statuses[base]
    if not status.available:
        raise DeviceUnavailableError(f"device {device!r} cannot run here: {status.reason}")
    return device


def create_runner(checkpoint: Checkpoint, device: str = "auto", **options: Any) -> ModelRunner:
    """Loads ``checkpoint`` on ``device``.

    Args:
        checkpoint: An opened model.
        device: ``auto``, ``cpu``, ``reference`` (NumPy), ``torch`` or ``torch:DEVICE`` (such as ``torch:npu:0``).
        **options: Options of the backend: ``threads``, ``max_batch_tokens``, ``precision``, ``isa`` for ``cpu``. Options
            that are None are left to the backend.

    Raises:
        InvalidArgumentError: An unknown device, or an option that the device does not have.
        DeviceUnavailableError: The device cannot run here.
    """
    chosen = select_device(device)
    given = {name: value for name, value in options.items() if value is not None}
    if chosen == "cpu":
        return CpuRunner(checkpoint, **given)
    for name in ("threads", "max_batch_tokens"):  # limits of the native core; NumPy has its own
        given.pop(name, None)
    if given:
        raise InvalidArgumentError(f"device {chosen!r} has no option {', '.join(sorted(given))}")
    if chosen == "reference":
        return ReferenceRunner(checkpoint)
    if chosen.startswith("torch"):
        return ReferenceRunner(
            checkpoint, array_namespace="torch", device=chosen.partition(":")[2] or "cpu"
        )
    raise InvalidArgumentError(
        "device 'mock' has no model files; build sagellm.backends.mock.MockRunner and hand it to Engine"
    )


def _probe_cpu() -> DeviceStatus:
    try:
        core = load_core()
    except DeviceUnavailableError as error:
        return DeviceStatus(name="cpu", available=False, reason=str(error))
    isa = core.kernels.selected_isa()
    failure = _self_test(core, isa)
    if failure:
        return DeviceStatus(name="cpu", available=False, reason=f"self-test failed: {failure}")
    return DeviceStatus(name="cpu", available=True, reason=f"native kernels, {isa}")


def _self_test(core: ModuleType, isa: str) -> str | None:
    """Multiplies a small Q8_0 matrix on the selected kernels; returns what is wrong, or None."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((16, 64), dtype=np.float32)
    x = rng.standard_normal((3, 64), dtype=np.float32)
    raw = core.quant.quantize("Q8_0", weights)
    packed = core.quant.pack("Q8_0", raw, 16, 64)
    got = core.kernels.matmul(isa, packed, x, precision="a15")
    error = float(np.abs(got - x @ weights.T).max())
    return None if error < 0.2 else f"matmul differs from NumPy by {error:.3g}"


def _probe_torch() -> DeviceStatus:
    if importlib.util.find_spec("torch") is None:
        return DeviceStatus(
            name="torch", available=False, reason="torch is not installed; pip install 'sagellm[torch]'"
        )
    return DeviceStatus(
        name="torch", available=True, reason="reference backend on torch; name the device, as in torch:cpu"
    )
