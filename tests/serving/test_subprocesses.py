"""Child processes: started, stopped, killed, reaped; with their output bounded."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from sagellm.errors import InvalidArgumentError, UnavailableError
from sagellm.serving import SubprocessManager

TIMEOUT_S = 20.0
WAIT = "import signal; signal.pause()"


def python(code: str, *arguments: str, **options: object) -> SubprocessManager:
    return SubprocessManager([sys.executable, "-c", code, *arguments], **options)  # type: ignore[arg-type]


def wait_for_line(path: Path) -> str:
    """Open a FIFO that the child writes to: returns once it has."""
    with path.open() as pipe:
        return pipe.readline().strip()


def fifo(folder: Path) -> Path:
    path = folder / "fifo"
    os.mkfifo(path)
    return path


def state(pid: int | None) -> str | None:
    """Return the state letter of a process, or None if it is gone (reaped)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return None


def test_exit_code_and_output_of_a_child_that_ends() -> None:
    child = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    child.start()
    assert child.wait(TIMEOUT_S) == 3
    assert (child.is_running(), child.returncode) == (False, 3)
    assert sorted(child.output().split()) == ["err", "out"]
    assert child.stop() == 3


def test_a_child_that_ends_by_itself_is_reaped_without_being_asked() -> None:
    child = python("")
    child.start()
    assert child._exited.wait(TIMEOUT_S)
    assert state(child.pid) is None


def test_stop_asks_first(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(7)); "
        "open(sys.argv[1], 'w').write('ready'); signal.pause()"
    )
    with python(code, str(path := fifo(tmp_path))) as child:
        assert wait_for_line(path) == "ready"
        assert child.is_running()
        assert child.stop() == 7


def test_stop_kills_a_child_that_will_not_end_and_its_children(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); child = os.fork()\n"
        "if child: open(sys.argv[1], 'w').write(str(child))\n"
        "while True: signal.pause()"
    )
    child = python(code, str(path := fifo(tmp_path)), stop_timeout=0.05)
    child.start()
    grandchild = int(wait_for_line(path))
    assert child.stop() == -signal.SIGKILL
    assert state(child.pid) is None
    assert state(grandchild) in (None, "Z", "X")


def test_leaving_the_context_stops_the_child_even_after_an_error() -> None:
    with pytest.raises(KeyError), python(WAIT) as child:
        raise KeyError
    assert child.returncode == -signal.SIGTERM
    assert state(child.pid) is None


def test_output_keeps_only_its_end() -> None:
    child = python("print('x' * 300_000 + 'end')", max_output_bytes=1000)
    child.start()
    child.wait(TIMEOUT_S)
    text = child.output()
    assert len(text) == 1000 and text.endswith("xend\n")
    assert sum(map(len, child._chunks)) <= 1000 + 64 * 1024


def test_environment_is_added_to_and_folder_is_used(tmp_path: Path) -> None:
    code = "import os; print(os.environ['MINE'], 'PATH' in os.environ, os.getcwd())"
    child = python(code, env={"MINE": "1"}, cwd=tmp_path)
    child.start()
    child.wait(TIMEOUT_S)
    assert child.output().split() == ["1", "True", str(tmp_path)]


def test_a_child_can_be_started_again_but_not_twice() -> None:
    with python(WAIT) as child:
        with pytest.raises(InvalidArgumentError, match="runs already"):
            child.start()
        first = child.pid
        child.stop()
        child.start()
        assert child.is_running() and child.pid != first


def test_wait_is_bounded_and_needs_a_start() -> None:
    with python(WAIT) as child, pytest.raises(TimeoutError, match="still runs"):
        child.wait(0.01)
    fresh = python(WAIT)
    assert fresh.stop() is None
    assert (fresh.pid, fresh.returncode, fresh.is_running()) == (None, None, False)
    with pytest.raises(UnavailableError, match="start"):
        fresh.wait()


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    for command, options in ((["no-such-program-x"], {}), ([sys.executable], {"cwd": "/missing"})):
        with pytest.raises(InvalidArgumentError, match="cannot start"):
            SubprocessManager(command, **options).start()  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="list"):
        SubprocessManager("echo hello")
