"""A process with all that it starts: its peak memory, and its end without leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.02
_TERM_S = 3.0
_KILL_S = 10.0
_SESSION_FIELD = 3  # of /proc/PID/stat after the name: state, parent, group, session
_PARENT_FIELD = 1


def members(session: int) -> list[int]:
    """The living processes of a session, and their descendants outside it."""
    parents: dict[int, int] = {}
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] in "ZX":
            continue
        pid = int(entry.name)
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
    try:
        state = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


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
