"""Makes a peer's virtual environment, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sagellm.bench import machine_processes
from sagellm.bench.peers import Installation, Peer, find, inspect, marker
from sagellm.errors import SagellmError, UnavailableError

_REPORT_S = 10.0
_TAIL = 400
_CMAKE_COMMON = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)

Say = Callable[[str], None]


def install(peer: Peer, folder: Path, *, say: Say, version: str | None = None) -> Installation:
    """Installs ``peer`` below ``folder``; an installation that is complete is left as it is.

    A run that is cut off removes what it made. One that is killed leaves a mark by which the peer
    counts as absent until this is called again.

    Args:
        peer: What to install.
        folder: Made if need be.
        say: Told what is being done, now and then.
        version: Of the peer's package; None takes the newest.

    Raises:
        UnavailableError: Another process installs the same, or a step of the installation failed.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _under_way(peer, folder) as resumed:
        place = folder / peer.name
        found = inspect(peer, folder)
        if not resumed and found.absent is None:
            say(f"{peer.name}: {found.version} is installed; remove {place} to install it anew")
            return found
        if place.is_symlink():
            raise UnavailableError(f"{place} is a link that leads to no {peer.name}; remove it")
        shutil.rmtree(place, ignore_errors=True)
        try:
            _make(peer, place, folder / f"{peer.name}.log", version, say)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    found = find(peer, folder)
    if found.absent is not None:
        raise UnavailableError(f"{peer.name} was installed, but cannot be used: {found.absent}")
    say(f"{peer.name}: {found.version} is ready")
    return found


@contextmanager
def _under_way(peer: Peer, folder: Path) -> Iterator[bool]:
    """Holds the mark of an installation; gives whether an earlier one was cut off."""
    mark = marker(peer, folder)
    resumed = mark.exists()
    with open(mark, "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(
                f"another process installs {peer.name} in {folder}; wait for it"
            ) from None
        try:
            yield resumed
        finally:
            mark.unlink(missing_ok=True)


def _make(peer: Peer, place: Path, log: Path, version: str | None, say: Say) -> None:
    with open(log, "wb") as output:
        run = _Steps(peer.name, output.fileno(), log, say)
        run("making a virtual environment", [sys.executable, "-m", "venv", str(place)])
        pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        wanted = peer.distribution + ("" if version is None else f"=={version}")
        if not peer.cmake:
            run(f"installing {wanted}", [*pip, "install", wanted, *peer.extras])
            return
        run("installing cmake and ninja", [*pip, "install", "cmake", "ninja"])
        with tempfile.TemporaryDirectory(prefix=".build-", dir=place) as scratch:
            _build(peer, place, Path(scratch), [*pip, "download"], wanted, run)


def _build(
    peer: Peer, place: Path, scratch: Path, download: list[str], wanted: str, run: _Steps
) -> None:
    """Builds the benchmark programs of the llama.cpp that the source distribution carries."""
    for compiler in ("cc", "c++"):
        if shutil.which(compiler) is None:
            raise UnavailableError(
                f"building {peer.name} needs a C++ compiler and there is no `{compiler}`; "
                "install one (on Debian: apt install g++)"
            )
    options = ["--no-deps", "--no-binary", peer.distribution, "--dest", str(scratch)]
    run(f"downloading the source of {wanted}", [*download, *options, wanted])
    archive = next(scratch.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(scratch / "source", filter="data")
    source = next(scratch.glob("source/*/vendor/llama.cpp"))
    build = scratch / "build"
    tools = place / "bin"
    configure = [str(tools / "cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *_CMAKE_COMMON, *peer.cmake]
    run("configuring llama.cpp", configure)
    jobs = str(len(os.sched_getaffinity(0)))
    make = [str(tools / "cmake"), "--build", str(build), "-j", jobs, "--target", *peer.programs]
    run("building llama.cpp", make)
    for program in peer.programs:
        shutil.copy2(build / "bin" / program, tools / program)


class _Steps:
    """Runs commands one after the other; their words go to a log file."""

    def __init__(self, name: str, output: int, log: Path, say: Say) -> None:
        self._name = name
        self._output = output
        self._log = log
        self._say = say

    def __call__(self, what: str, command: Sequence[str]) -> None:
        """Runs one; tells what it does at the start and every ten seconds.

        Raises:
            UnavailableError: It failed; the message holds its last words.
        """
        self._say(f"{self._name}: {what}")
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    status = process.wait(_REPORT_S)
                    break
                except subprocess.TimeoutExpired:
                    seconds = time.monotonic() - start
                    self._say(f"{self._name}: {what}, {seconds:.0f} s: {self._last_line()}")
        finally:
            machine_processes.end(process)
        if status != 0:
            raise _failed(self._name, what, status, self._tail(), self._log)

    def _tail(self) -> str:
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()

    def _last_line(self) -> str:
        lines = self._tail().splitlines()
        return lines[-1].strip()[:100] if lines else ""


def _failed(name: str, what: str, status: int, words: str, log: Path) -> SagellmError:
    return UnavailableError(
        f"{name}: {what} ended with status {status}; the whole log is {log}; its end: {words}"
    )
