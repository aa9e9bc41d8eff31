"""The idle check against counters that the test writes, and the end of process trees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.bench import machine, machine_processes
from sagellm.errors import UnavailableError

HZ = os.sysconf("SC_CLK_TCK")


class FakeProc:
    """A ``/proc`` whose counters grow by given amounts with every pause."""

    def __init__(self, folder: Path, busy_shares: list[float]) -> None:
        self.folder = folder
        self.shares = busy_shares
        self.total = 0.0
        self.busy = 0.0
        (folder / "700").mkdir()
        (folder / "self").mkdir()
        self.write()

    def write(self) -> None:
        busy, idle = int(self.busy * HZ), int((self.total - self.busy) * HZ)
        half = busy // 2
        # user nice system idle iowait irq softirq steal guest guest_nice
        line = f"cpu  {half} 0 0 {idle} 0 0 0 {busy - half} {half} 0\n"
        (self.folder / "stat").write_text(line + "cpu0 1 2 3\n")
        (self.folder / "700" / "stat").write_text(
            f"700 (my (odd) name) R 1 700 700 0 -1 0 0 0 0 0 {busy} 0 0 0 20 0 1 0 5\n"
        )

    def pause(self, seconds: float) -> None:
        cpus = os.cpu_count() or 1
        self.total += cpus * seconds
        self.busy += cpus * seconds * self.shares.pop(0)
        self.write()


def wait(fake: FakeProc, patience_s: float, *, allow_busy: bool = False) -> tuple[float, list[str]]:
    said: list[str] = []
    load = machine.wait_until_idle(
        patience_s=patience_s,
        allow_busy=allow_busy,
        say=said.append,
        proc=fake.folder,
        pause=fake.pause,
    )
    return load.share, said


def test_an_idle_machine_is_measured_at_once(tmp_path: Path) -> None:
    share, said = wait(FakeProc(tmp_path, [0.02]), 0.0)
    assert share == pytest.approx(0.02, abs=0.01)
    assert said == []


def test_a_busy_machine_is_waited_for(tmp_path: Path) -> None:
    fake = FakeProc(tmp_path, [0.9, 0.5, 0.01])
    _, said = wait(fake, 10.0)
    assert fake.shares == []
    assert len(said) == 2
    assert "90 % of its CPU time is in use: my (odd) name (700)" in said[0]


def test_a_machine_that_stays_busy_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"my \(odd\) name \(700\).*--allow-busy"):
        wait(FakeProc(tmp_path, [0.9] * 3), 3.0)


def test_allow_busy_tells_the_load_instead(tmp_path: Path) -> None:
    share, _ = wait(FakeProc(tmp_path, [0.5]), 0.0, allow_busy=True)
    assert share == pytest.approx(0.5, abs=0.01)


def test_this_machine_is_described() -> None:
    described = machine.describe()
    assert described["cpus"] == os.cpu_count()
    assert float(described["memory_gb"]) > 0
    times = machine.cpu_times()
    assert 0 < times.busy < times.total
    assert any(pid == os.getpid() for pid, _ in times.processes)


STUBBORN = """
import os, signal, subprocess, sys
own = dict(start_new_session=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], **own)
block = bytearray(50_000_000)
print(os.getpid(), child.pid, flush=True)
signal.pause()
"""


def lives(pid: int) -> bool:
    """A process that has ended may wait for init to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


BUSY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
while time.process_time() < 0.1:
    pass
print(child.pid, flush=True)
sys.stdin.readline()
print("goes on", flush=True)
time.sleep(1000)
"""


def test_a_stopped_tree_uses_no_cpu_goes_on_later_and_can_be_ended() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pids = [process.pid, int(process.stdout.readline())]

    def states() -> list[str]:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
        return [stat.rpartition(")")[2].split()[0] for stat in stats]

    machine_processes.stop(process.pid)
    assert states() == ["T", "T"]
    used = machine_processes.cpu_seconds(process.pid)
    assert used >= 0.1
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert states() == ["T", "T"]
    machine_processes.resume(process.pid)
    assert process.stdout.readline() == b"goes on\n"
    machine_processes.stop(process.pid)
    machine_processes.end(process)
    process.stdin.close()
    process.stdout.close()
    assert process.returncode == -signal.SIGTERM
    assert not any(map(lives, pids))


def test_the_end_reaches_processes_that_left_the_session_or_ignore_sigterm() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert set(pids) <= set(machine_processes.members(process.pid))
    assert machine_processes.peak_memory_mb(process.pid) > 50
    machine_processes.end(process)
    process.stdout.close()
    assert process.returncode is not None
    assert not any(map(lives, pids))
