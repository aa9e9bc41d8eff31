"""``sagellm info``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import numpy as np
import pydantic
import typer

import sagellm
from sagellm.backends import probe_devices
from sagellm.backends.cuda import load_cuda
from sagellm.backends.nccl import describe_nccl
from sagellm.engine.memory import available_memory
from sagellm.errors import DeviceUnavailableError
from sagellm.native import load_core
from sagellm.terminal import print_columns


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine can run.

    CPU features, the instruction-set path in use (SAGELLM_CPU_ISA forces another), devices and why
    one cannot run, free memory, versions.

    \b
    Examples:
      sagellm info
      sagellm info --json
    """  # noqa: D301
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "devices":
            for device in value:
                mark = "yes" if device["available"] else "no "
                rows.append((f"device {device['name']}", f"{mark}  {device['reason']}"))
        elif isinstance(value, dict):
            rows.append((name, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif isinstance(value, list):
            rows.append((name, " ".join(map(str, value))))
        else:
            rows.append((name, str(value)))
    print_columns(rows)


def collect() -> dict[str, Any]:
    """What ``sagellm info`` shows, as plain values."""
    facts: dict[str, Any] = {
        "sagellm": sagellm.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
    }
    try:
        core = load_core()
    except DeviceUnavailableError as error:
        facts["native core"] = str(error)
    else:
        facts["cpu"] = core.kernels.cpu_brand() or "unknown"
        facts["cpu features"] = core.kernels.cpu_features()
        facts["isa path"] = core.kernels.selected_isa()
        facts["isa paths that run here"] = core.kernels.available_isas()
    facts["devices"] = [
        {"name": d.name, "available": d.available, "reason": d.reason} for d in probe_devices()
    ]
    nccl = _nccl()
    if nccl is not None:
        facts["nccl"] = nccl
    facts["memory available"] = f"{available_memory() / 2**30:.1f} GiB"
    facts["versions"] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pydantic": pydantic.VERSION,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    return facts


def _nccl() -> str | None:
    """What connects several NVIDIA devices, or why nothing does; None without ``_cuda``."""
    try:
        module = load_cuda()
    except DeviceUnavailableError:
        return None
    try:
        return describe_nccl(module)
    except DeviceUnavailableError as error:
        return str(error)
