"""Whether the machine is free to be measured, and what it is, from ``/proc``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sagellm.errors import UnavailableError

PROC = Path("/proc")
IDLE_LIMIT = 0.05  # of all CPU time
_WINDOW_S = 1.0
_NAMED = 3
_WORTH_NAMING = 0.01  # of one CPU
_IDLE_FIELDS = (3, 4)  # idle, iowait
_COUNTED_FIELDS = 8  # up to steal; guest time is part of user time

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """CPU seconds since the machine's start.

    Attributes:
        busy: All CPUs, time that a hypervisor took included.
        total: ``busy`` and idle time.
        processes: Seconds by (process id, name).
    """

    busy: float
    total: float
    processes: dict[tuple[int, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What ran in a window of time.

    Attributes:
        share: Busy share of all CPU time, 0 to 1.
        processes: The busiest ones, such as ``"gcc (812) 97 %"``, in percent of one CPU.
    """

    share: float
    processes: tuple[str, ...]

    @property
    def is_idle(self) -> bool:
        """Whether so little runs that measurements mean something."""
        return self.share <= IDLE_LIMIT

    def __str__(self) -> str:
        by = f": {', '.join(self.processes)}" if self.processes else ""
        return f"{100 * self.share:.0f} % of its CPU time is in use{by}"


def cpu_times(proc: Path = PROC, *, by_process: bool = True) -> CpuTimes:
    """Reads the counters now."""
    tick = os.sysconf("SC_CLK_TCK")
    first = (proc / "stat").read_text().split("\n", 1)[0].split()
    ticks = [int(field) for field in first[1 : 1 + _COUNTED_FIELDS]]
    total = sum(ticks)
    idle = sum(ticks[i] for i in _IDLE_FIELDS)
    processes = {}
    for entry in proc.iterdir() if by_process else ():
        if entry.name.isdigit():
            try:
                head, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:  # it has ended
                continue
            fields = rest.split()
            name = head.partition("(")[2]
            processes[int(entry.name), name] = (int(fields[11]) + int(fields[12])) / tick
    return CpuTimes(busy=(total - idle) / tick, total=total / tick, processes=processes)


def load_between(before: CpuTimes, after: CpuTimes) -> Load:
    """What ran between two readings, this process left out of the names."""
    total = after.total - before.total
    used = {
        key: seconds - before.processes.get(key, 0.0) for key, seconds in after.processes.items()
    }
    used.pop((os.getpid(), _own_name()), None)
    busiest = sorted(used, key=lambda key: used[key], reverse=True)[:_NAMED]
    window = total / (os.cpu_count() or 1)
    shown = tuple(
        f"{name} ({pid}) {100 * used[pid, name] / window:.0f} %"
        for pid, name in busiest
        if window > 0 and used[pid, name] / window >= _WORTH_NAMING
    )
    return Load(share=(after.busy - before.busy) / total if total > 0 else 0.0, processes=shown)


def wait_until_idle(
    *,
    patience_s: float,
    allow_busy: bool,
    say: Say,
    proc: Path = PROC,
    pause: Callable[[float], None] = time.sleep,
) -> Load:
    """Watches the machine for a second, again and again until it is idle.

    Returns:
        The last load seen; not idle only where ``allow_busy``.

    Raises:
        UnavailableError: It was busy for ``patience_s``; the message names the busiest processes.
    """
    waited = 0.0
    while True:
        before = cpu_times(proc)
        pause(_WINDOW_S)
        waited += _WINDOW_S
        load = load_between(before, cpu_times(proc))
        if load.is_idle or allow_busy:
            return load
        if waited >= patience_s:
            raise UnavailableError(
                f"the machine is busy ({load}); end what runs, wait longer with --wait-idle "
                "SECONDS, or measure all the same with --allow-busy"
            )
        say(f"waiting for an idle machine, {waited:.0f} of {patience_s:.0f} s: {load}")


def describe(proc: Path = PROC) -> dict[str, str | int | float]:
    """Model and number of CPUs, memory and kernel, for a report."""
    model = platform.processor() or platform.machine()
    for line in (proc / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = (proc / "meminfo").read_text().split("\n", 1)[0].split()[1]
    return {
        "cpu": model,
        "cpus": os.cpu_count() or 1,
        "memory_gb": round(int(memory) * 1024 / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }


def _own_name() -> str:
    return Path("/proc/self/stat").read_text().rpartition(")")[0].partition("(")[2]
