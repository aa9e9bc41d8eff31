"""The model store, with real wheels in a local folder and the real pip."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from models.make_tiny import make_tiny_gguf, make_tiny_hf
from models.make_tiny_encoder import make_tiny_encoder
from sagellm.checkpoint import open_checkpoint, store
from sagellm.checkpoint.catalogue import (
    CATALOGUE,
    DEFAULT_MODEL,
    ArchiveMember,
    CatalogueEntry,
    WheelPart,
)
from sagellm.checkpoint.download import _choose_files
from sagellm.checkpoint.encoder import open_encoder
from sagellm.checkpoint.store import ModelStore
from sagellm.errors import (
    CorruptFileError,
    InvalidArgumentError,
    ModelNotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)


def write_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    tag = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": tag.encode(),
    }
    record = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"])
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    return path


class Source:
    """A folder of wheels as pip's only index, and a catalogue of one model split in two."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.wheels))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        self.content = make_tiny_gguf(folder / "tiny.gguf").read_bytes()
        half = len(self.content) // 2
        self.paths = [
            write_wheel(
                self.wheels,
                "tiny-part1",
                {
                    "tiny_part1/model.part0": self.content[:half],
                    "tiny_part1/LICENSE": b"Do what you like.",
                    "../../escape": b"never extracted",
                },
            ),
            write_wheel(self.wheels, "tiny-part2", {"tiny_part2/model.part1": self.content[half:]}),
        ]
        first = WheelPart(
            package="tiny-part1",
            version="1.0",
            nbytes=self.paths[0].stat().st_size,
            member="tiny_part1/model.part0",
            notices=("tiny_part1/LICENSE",),
        )
        second = WheelPart(
            package="tiny-part2",
            version="1.0",
            nbytes=self.paths[1].stat().st_size,
            member="tiny_part2/model.part1",
        )
        self.entry = CatalogueEntry(
            name="tiny",
            description="a tiny model",
            license="CC0-1.0",
            file_name="tiny.gguf",
            nbytes=len(self.content),
            sha256=hashlib.sha256(self.content).hexdigest(),
            parts=(first, second),
        )
        self.store = self.with_entry(self.entry)

    def with_entry(self, entry: CatalogueEntry) -> ModelStore:
        """A store on the same folder whose catalogue has ``entry``."""
        return ModelStore(self.wheels.parent / "models", {"tiny": entry})

    def files(self) -> set[str]:
        """Everything in the store, lock files aside."""
        root = self.store.root
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix != ".lock"}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    return Source(tmp_path, monkeypatch)


def test_a_pulled_model_is_whole_verified_and_opens(source: Source) -> None:
    reports: list[tuple[int, int]] = []
    path = source.store.pull("tiny", lambda done, total: reports.append((done, total)))
    assert path.read_bytes() == source.content
    assert open_checkpoint(path).config.architecture == "llama"
    assert source.files() == {"tiny", "tiny/tiny.gguf", "tiny/LICENSE", "tiny/manifest.json"}
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1] == (source.entry.download_nbytes,) * 2
    assert not (source.store.root.parent / "escape").exists()


def test_a_model_in_the_store_is_not_downloaded_again(source: Source) -> None:
    path = source.store.pull("tiny")
    for wheel in source.paths:
        wheel.unlink()
    assert source.store.pull("tiny") == path
    assert source.store.resolve("tiny") == path


def test_list_show_and_remove(source: Source) -> None:
    assert source.store.list_models() == []
    with pytest.raises(ModelNotFoundError, match="sagellm pull tiny"):
        source.store.show("tiny")
    path = source.store.pull("tiny")
    model = source.store.show("tiny")
    assert source.store.list_models() == [model]
    assert (model.name, model.path, model.license) == ("tiny", path, "CC0-1.0")
    assert model.nbytes >= len(source.content) and model.sha256 == source.entry.sha256
    assert source.store.remove("tiny") == model.nbytes
    assert source.files() == set()
    with pytest.raises(ModelNotFoundError):
        source.store.remove("tiny")


def test_resolve_takes_paths_names_and_says_what_is_missing(source: Source, tmp_path: Path) -> None:
    resolve = source.store.resolve
    assert resolve(tmp_path / "tiny.gguf") == tmp_path / "tiny.gguf"
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFoundError, match="sagellm pull tiny"):
        resolve("tiny")
    with pytest.raises(ModelNotFoundError, match="sagellm pull org/repo"):
        resolve("org/repo")
    for unknown in ("nonsense", "", "a/b/c/d", "../x", "./tiny", str(tmp_path / "no.gguf")):
        with pytest.raises(ModelNotFoundError, match=r"catalogue \(tiny\)"):
            resolve(unknown)
    assert resolve("tiny", auto_pull=True) == source.store.root / "tiny" / "tiny.gguf"


def test_a_pull_that_was_killed_starts_over_cleanly(source: Source) -> None:
    source.store.root.mkdir(parents=True)
    leftover = source.store.root / ".partial-tiny-~abc"
    (leftover / "model").mkdir(parents=True)
    (leftover / "model" / "tiny.gguf").write_bytes(b"half")
    damaged = source.store.root / "tiny"
    damaged.mkdir()
    (damaged / "tiny.gguf").write_bytes(source.content[:100])  # no manifest: never finished
    assert source.store.list_models() == []
    assert source.store.pull("tiny").read_bytes() == source.content
    assert not leftover.exists()


def test_an_interrupted_pull_leaves_nothing(source: Source) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= source.entry.parts[0].nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.store.pull("tiny", interrupt)
    assert source.files() == set()
    assert source.store.pull("tiny").read_bytes() == source.content


def test_a_model_that_lost_bytes_is_pulled_again(source: Source) -> None:
    path = source.store.pull("tiny")
    path.write_bytes(source.content[:-10])
    with pytest.raises(ModelNotFoundError):
        source.store.resolve("tiny")
    assert source.store.pull("tiny").read_bytes() == source.content


def test_a_changed_package_is_refused(source: Source) -> None:
    changed = bytearray(source.content)
    changed[-1] ^= 1
    half = len(changed) // 2
    write_wheel(source.wheels, "tiny-part2", {"tiny_part2/model.part1": bytes(changed[half:])})
    with pytest.raises(CorruptFileError, match="SHA-256"):
        source.store.pull("tiny")
    assert source.files() == set()


def test_a_member_larger_than_promised_stops_the_unpacking(source: Source) -> None:
    small = source.with_entry(replace(source.entry, nbytes=100))
    with pytest.raises(CorruptFileError, match="larger than the catalogue says"):
        small.pull("tiny")
    assert source.files() == set()


def test_a_wheel_without_the_member_is_refused(source: Source) -> None:
    write_wheel(source.wheels, "tiny-part2", {"tiny_part2/other": b""})
    with pytest.raises(CorruptFileError, match=r"model\.part1"):
        source.store.pull("tiny")


def test_a_failing_pip_is_quoted(source: Source) -> None:
    source.paths[1].unlink()
    with pytest.raises(ModelNotFoundError, match=r"tiny-part2==1\.0.*No matching distribution"):
        source.store.pull("tiny")
    assert source.files() == set()


def test_a_python_without_pip_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        source.store.pull("tiny")


def test_a_small_disk_is_named_before_the_download(source: Source) -> None:
    huge = source.with_entry(replace(source.entry, nbytes=1 << 60))
    with pytest.raises(ResourceExhaustedError, match="SAGELLM_HOME"):
        huge.pull("tiny")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(entry: CatalogueEntry, folder: Path, progress: object) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(source.content)

    monkeypatch.setattr(store, "fetch_entry", fill_up)
    with pytest.raises(ResourceExhaustedError, match=r"disk .* is full.*SAGELLM_HOME"):
        source.store.pull("tiny")
    assert source.files() == set()


def test_a_store_that_cannot_be_made_is_named(source: Source, tmp_path: Path) -> None:
    blocked = ModelStore(tmp_path / "tiny.gguf" / "models", {"tiny": source.entry})
    with pytest.raises(InvalidArgumentError, match="SAGELLM_HOME"):
        blocked.pull("tiny")


def _pull_in_process(root: Path, entry: CatalogueEntry) -> bytes:
    return ModelStore(root, {"tiny": entry}).pull("tiny").read_bytes()


def test_two_processes_may_pull_the_same_model(source: Source) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        jobs = [
            pool.apply_async(_pull_in_process, (source.store.root, source.entry)) for _ in range(2)
        ]
        assert [job.get(timeout=60) for job in jobs] == [source.content] * 2
    assert source.files() == {"tiny", "tiny/tiny.gguf", "tiny/LICENSE", "tiny/manifest.json"}


def test_a_manifest_cannot_point_outside_its_folder(source: Source) -> None:
    source.store.pull("tiny")
    manifest = source.store.root / "tiny" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"file": "../../tiny.gguf"}))
    assert source.store.list_models() == []


def test_the_store_is_under_sagellm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path / "home"))
    assert ModelStore().root == tmp_path / "home" / "models"
    assert store.list_models() == []
    monkeypatch.delenv("SAGELLM_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelStore().root == tmp_path / ".cache" / "sagellm" / "models"


def test_the_catalogue_is_consistent() -> None:
    assert DEFAULT_MODEL in CATALOGUE
    for name, entry in CATALOGUE.items():
        assert entry.name == name and len(entry.sha256) == 64 and entry.parts
        assert entry.file_name.endswith(".zip" if entry.members else ".gguf")
        for member in entry.members:
            folder, _, file_name = member.path.rpartition("/")
            assert all(part.strip(".") and "/" not in part for part in (folder or "x", file_name))


# --------------------------------------------------------------------------- a folder in an archive

ALL_MODULES = ("Transformer", "Pooling", "Normalize")


class FolderSource(Source):
    """A catalogue whose model is an encoder's folder, zipped inside one wheel."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        made = make_tiny_encoder(folder / "encoder", modules=ALL_MODULES)
        self.contents = {
            str(file.relative_to(made)): file.read_bytes()
            for file in made.rglob("*")
            if file.is_file()
        }
        members = tuple(
            ArchiveMember(path=path, nbytes=len(content)) for path, content in self.contents.items()
        )
        self.entry = replace(
            self.entry, file_name="model.zip", parts=self.entry.parts[:1], members=members
        )
        self.publish(self.contents | {"../../escape": b"never", "more.bin": b"not asked for"})

    def publish(self, contents: dict[str, bytes], trim: int = 0) -> ModelStore:
        """Puts an archive of ``contents`` into the wheel and its facts into the catalogue."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in contents.items():
                archive.writestr(path, content)
        data = packed.getvalue()[: len(packed.getvalue()) - trim]
        wheel = write_wheel(self.wheels, "tiny-part1", {"tiny_part1/model.zip": data})
        part = replace(
            self.entry.parts[0],
            nbytes=wheel.stat().st_size,
            member="tiny_part1/model.zip",
            notices=(),
        )
        self.entry = replace(
            self.entry, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest(), parts=(part,)
        )
        self.store = self.with_entry(self.entry)
        return self.store


@pytest.fixture
def folder_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    return FolderSource(tmp_path, monkeypatch)


def test_a_folder_is_unpacked_whole_and_only_what_the_catalogue_names(
    folder_source: FolderSource,
) -> None:
    store = folder_source.store
    path = store.pull("tiny")
    assert path == store.root / "tiny" and store.resolve("tiny") == path
    assert open_encoder(path).config.pooling == "mean"
    assert {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()} == {
        **folder_source.contents,
        "manifest.json": (path / "manifest.json").read_bytes(),
    }
    model = store.show("tiny")
    assert model.nbytes == sum(map(len, folder_source.contents.values()))
    assert store.list_models() == [model]
    (path / "1_Pooling" / "config.json").unlink()  # a folder that lost a file is not whole
    assert store.list_models() == []
    assert store.pull("tiny") == path
    assert store.remove("tiny") == model.nbytes
    assert folder_source.files() == set()


def test_a_member_of_another_size_is_refused(folder_source: FolderSource) -> None:
    config = folder_source.contents["config.json"]
    for changed, message in ((config + b" ", "larger"), (config[:-1], "expected")):
        store = folder_source.publish(folder_source.contents | {"config.json": changed})
        with pytest.raises(CorruptFileError, match=message):
            store.pull("tiny")
        assert folder_source.files() == set()


def test_an_archive_that_is_damaged_is_refused(folder_source: FolderSource) -> None:
    rest = {name: c for name, c in folder_source.contents.items() if name != "modules.json"}
    with pytest.raises(CorruptFileError, match=r"modules\.json"):
        folder_source.publish(rest).pull("tiny")
    with pytest.raises(CorruptFileError, match="not the expected archive"):
        folder_source.publish(folder_source.contents, trim=30).pull("tiny")
    wrong = replace(folder_source.entry, sha256="0" * 64)
    with pytest.raises(CorruptFileError, match="SHA-256"):
        folder_source.with_entry(wrong).pull("tiny")
    assert folder_source.files() == set()


def test_the_space_for_the_unpacked_files_counts(folder_source: FolderSource) -> None:
    huge = (ArchiveMember(path="config.json", nbytes=1 << 60),)
    with pytest.raises(ResourceExhaustedError, match="SAGELLM_HOME"):
        folder_source.with_entry(replace(folder_source.entry, members=huge)).pull("tiny")


# ---------------------------------------------------------------------------------- Hugging Face


def test_a_repository_without_the_hub_library_says_how_to_get_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'sagellm\[hf\]'"):
        source.store.pull("org/repo")


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that a download uses, over one local folder."""

    folder: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        if path.startswith("/api/models/org/repo/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(
                json.dumps({"id": "org/repo", "sha": "a" * 40, "siblings": siblings}).encode()
            )
        elif path.startswith("/org/repo/resolve/") and path.rpartition("/")[2] in files:
            self.answer(files[path.rpartition("/")[2]])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_repository_is_pulled_without_its_code(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    folder = make_tiny_hf(tmp_path / "repo", "qwen3", shards=2)
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    handler = type("Handler", (HubHandler,), {"folder": folder})
    program = (
        "from sagellm.checkpoint import open_checkpoint, resolve, store\n"
        "path = store.pull('org/repo')\n"
        "assert open_checkpoint(path).config.architecture == 'qwen3'\n"
        "assert resolve.resolve_model('org/repo') == path\n"
        "assert [model.name for model in store.list_models()] == ['org/repo']\n"
        "assert not list(path.glob('*.py')) and not (path / '.cache').exists()\n"
        "try:\n    store.pull('org/absent')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "SAGELLM_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        try:
            result = subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | settings,
                capture_output=True,
                text=True,
                timeout=120,
            )
        finally:
            server.shutdown()
            thread.join()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ModelNotFoundError org/absent could not be downloaded")


def test_only_settings_tokenizer_and_weights_are_chosen(tmp_path: Path) -> None:
    found = {path.name for path in make_tiny_hf(tmp_path / "tiny", shards=2).iterdir()}
    extra = {"modeling_custom.py", "pytorch_model.bin", "original/model.safetensors", "README.md"}
    assert set(_choose_files("org/repo", found | extra, None)) == found


def test_a_gguf_repository_asks_for_a_file() -> None:
    found = {"a-Q4_K_M.gguf", "a-Q8_0.gguf", "README.md"}
    with pytest.raises(ModelNotFoundError, match=r"org/repo/a-Q4_K_M\.gguf, org/repo/a-Q8_0\.gguf"):
        _choose_files("org/repo", found, None)
    assert _choose_files("org/repo", found, "a-Q8_0.gguf") == ["a-Q8_0.gguf"]
    with pytest.raises(ModelNotFoundError, match=r"no file b\.gguf"):
        _choose_files("org/repo", found, "b.gguf")
    with pytest.raises(ModelNotFoundError, match="neither"):
        _choose_files("org/repo", {"README.md"}, None)
