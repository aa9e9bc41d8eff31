"""A process with all that it starts: its peak memory, and its end without leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from sagellm.errors import UnavailableError

_PROC = Path("/proc")
_POLL_S = 0.02
_TERM_S = 3.0
_KILL_S = 10.0
_STOP_S = 10.0
_SESSION_FIELD = 3  # of /proc/PID/stat after the name: state, parent, group, session
_PARENT_FIELD = 1
_CPU_FIELDS = slice(11, 15)  # user and system, own and of children that were waited for


def members(session: int) -> list[int]:
    """The living processes of a session, and their descendants outside it."""
    parents: dict[int, int] = {}
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fields = _stat(pid)
        if not fields or fields[0] in "ZX":
            continue
        parents[pid] = int(fields[_PARENT_FIELD])
        if int(fields[_SESSION_FIELD]) == session:
            found.add(pid)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return sorted(found)


def peak_memory_mb(session: int) -> float:
    """Sum of the largest resident sets of the living processes, in MB (10^6 bytes)."""
    total = 0
    for pid in members(session):
        try:
            status = (_PROC / str(pid) / "status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total / 1e6


def cpu_seconds(session: int) -> float:
    """Used by the living processes, and by those that they have waited for."""
    ticks = sum(int(field) for pid in members(session) for field in _stat(pid)[_CPU_FIELDS])
    return ticks / os.sysconf("SC_CLK_TCK")


def stop(session: int) -> None:
    """Stops all of a session (SIGSTOP) and returns when none of it runs.

    Raises:
        UnavailableError: One goes on.
    """
    deadline = time.monotonic() + _STOP_S
    while running := [pid for pid in members(session) if _stat(pid)[:1] not in (["T"], [])]:
        if time.monotonic() > deadline:
            raise UnavailableError(f"process {running[0]} cannot be stopped")
        _signal(set(running), signal.SIGSTOP)
        time.sleep(_POLL_S)


def resume(session: int) -> None:
    """Lets all of a stopped session go on (SIGCONT)."""
    _signal(set(members(session)), signal.SIGCONT)


def end(process: subprocess.Popen[bytes], *, gently: bool = True) -> None:
    """Ends a process that leads a session of its own, and all of the session.

    Args:
        process: Started with ``start_new_session``.
        gently: Ask first (SIGTERM), so that shared memory and temporary files are removed.
    """
    # Collected once: a worker in a session of its own is known only while its parent lives.
    known = set(members(process.pid))
    if gently:
        _signal(known, signal.SIGTERM)
        _signal(known, signal.SIGCONT)  # a stopped process would not notice
        _wait(process, known, _TERM_S)
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        known |= set(members(process.pid))
        if not _signal(known, signal.SIGKILL) and process.poll() is not None:
            return
        _wait(process, known, _POLL_S)


def _wait(process: subprocess.Popen[bytes], pids: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (process.poll() is None or any(map(_alive, pids))):
        time.sleep(_POLL_S)


def _alive(pid: int) -> bool:
    return (_stat(pid) or ["X"])[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat says after the name; nothing when it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _signal(pids: set[int], number: signal.Signals) -> bool:
    """Whether any of them lived."""
    lived = False
    for pid in pids:
        if _alive(pid):
            lived = True
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
    return lived
