"""What this machine can run: devices, their probes, and how to put a checkpoint on one."""

from __future__ import annotations

from sagellm.backends.devices import DeviceStatus, create_runner, probe_devices, select_device
from sagellm.backends.interface import (
    ForwardBatch,
    ModelRunner,
    SampledRow,
    SamplingRow,
    StepOutput,
)

__all__ = [
    "DeviceStatus",
    "ForwardBatch",
    "ModelRunner",
    "SampledRow",
    "SamplingRow",
    "StepOutput",
    "create_runner",
    "probe_devices",
    "select_device",
]
