"""``sagellm info`` and ``sagellm version``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import numpy as np
import pydantic
import typer
from rich.console import Console
from rich.table import Table

import sagellm
from sagellm.backends import probe_devices
from sagellm.engine.memory import available_memory
from sagellm.errors import DeviceUnavailableError
from sagellm.native import load_core


def version() -> None:
    """Print the version."""
    typer.echo(f"sagellm {sagellm.__version__}")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show CPU features, the instruction-set path, devices with reasons, memory and versions."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if name == "devices":
            for device in value:
                mark = "[green]yes[/]" if device["available"] else "[yellow]no[/]"
                table.add_row(f"device {device['name']}", f"{mark}  {device['reason']}")
        elif isinstance(value, dict):
            table.add_row(name, ", ".join(f"{k} {v}" for k, v in value.items()))
        elif isinstance(value, list):
            table.add_row(name, " ".join(map(str, value)))
        else:
            table.add_row(name, str(value))
    Console(soft_wrap=True).print(table)


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
        facts["cpu"] = core.kernels.cpu_name()
        facts["cpu features"] = core.kernels.cpu_features()
        facts["isa path"] = core.kernels.selected_isa()
        facts["isa paths that run here"] = core.kernels.available_isas()
    facts["devices"] = [
        {"name": d.name, "available": d.available, "reason": d.reason} for d in probe_devices()
    ]
    facts["memory available"] = f"{available_memory() / 2**30:.1f} GiB"
    facts["versions"] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pydantic": pydantic.VERSION,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    return facts
