"""The build as a user meets it: archives, switches, fallbacks, and the words that explain them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("g++") and shutil.which("ninja")),
    reason="needs cmake, ninja and g++",
)


def build(hook: str, target: Path, **environment: str) -> Path:
    """Calls a build-backend hook on this checkout and returns the archive."""
    code = f"from scikit_build_core.build import {hook} as h; print(h({str(target)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target / result.stdout.strip().splitlines()[-1]


def test_source_archive_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    archive = build("build_sdist", tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = ["CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "build.sh"]
    wanted += [str(p.relative_to(ROOT)) for p in (ROOT / "cmake").glob("*.cmake")]
    wanted += [str(p.relative_to(ROOT)) for p in (ROOT / "cpp").rglob("*.cc")]
    wanted += [str(p.relative_to(ROOT)) for p in (ROOT / "cpp").rglob("*.h")]
    wanted += [str(p.relative_to(ROOT)) for p in (ROOT / "python").rglob("*.py")]
    wanted += ["tests/cpp/CMakeLists.txt", "python/sagellm/py.typed"]
    assert set(wanted) <= names, sorted(set(wanted) - names)
    assert not [n for n in names if n.startswith(("build/", "dist/", ".venv"))]


def test_pure_wheel_is_built_without_cmake_or_compiler(tmp_path: Path) -> None:
    wheel = build(
        "build_wheel", tmp_path, SAGE_SKIP_C_EXTENSIONS="1", PATH="", CC="false", CXX="false"
    )
    assert wheel.name == f"sagellm-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"sagellm-{VERSION}.dist-info/METADATA").decode()
    assert {"sagellm/py.typed", "sagellm/errors.py", "sagellm_protocol/__init__.py"} <= names
    assert {f"sagellm/cmake/{p.name}" for p in (ROOT / "cmake").glob("*.cmake")} <= names
    assert f"sagellm-{VERSION}.dist-info/licenses/LICENSE" in names
    assert not [n for n in names if n.endswith(".so")]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert not [line for line in required if "torch" in line and "extra ==" not in line]


def configure(build_folder: Path, *arguments: str, **environment: str) -> str:
    """Configures the project and returns what CMake said."""
    command = ["cmake", "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *arguments]
    for switch in ("SAGE_COMMON_DEPS_FILE", "SAGE_ENABLE_GPERFTOOLS"):
        environment.setdefault(switch, "")
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return re.sub(r"\s+", " ", result.stdout + result.stderr)


SHARED_SCRIPT = """
add_library(pybind11::module INTERFACE IMPORTED)
set(SAGE_COMMON_COMPILE_OPTIONS -fstack-protector-strong)
set(SAGE_COMMON_COMPILE_DEFINITIONS SAGE_SHARED_MARK=1)
"""


@needs_cmake
@pytest.mark.build
def test_shared_script_provides_pybind11_and_compile_settings(tmp_path: Path) -> None:
    script = tmp_path / "deps.cmake"
    script.write_text(SHARED_SCRIPT)
    no_fallback = "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON"
    said = configure(tmp_path / "b", no_fallback, SAGE_COMMON_DEPS_FILE=str(script))
    assert f"SAGE_COMMON_DEPS_FILE={script}" in said
    commands = (tmp_path / "b" / "compile_commands.json").read_text()
    assert "SAGE_SHARED_MARK=1" in commands
    assert "-fstack-protector-strong" in commands


@needs_cmake
@pytest.mark.build
def test_missing_shared_script_is_reported_and_the_build_goes_on(tmp_path: Path) -> None:
    said = configure(tmp_path / "b", SAGE_COMMON_DEPS_FILE=str(tmp_path / "absent.cmake"))
    assert "Warning" in said
    assert f"SAGE_COMMON_DEPS_FILE={tmp_path / 'absent.cmake'} is not a file" in said
    assert "Generating done" in said


def links_profiler(build_folder: Path) -> bool:
    commands = (build_folder / "compile_commands.json").read_text()
    return "SAGELLM_HAVE_GPERFTOOLS" in commands


@needs_cmake
@pytest.mark.build
def test_gperftools_is_off_by_default_and_follows_the_environment(tmp_path: Path) -> None:
    said = configure(tmp_path / "off")
    assert "libprofiler" not in said
    assert not links_profiler(tmp_path / "off")
    said = configure(tmp_path / "on", SAGE_ENABLE_GPERFTOOLS="1")
    assert links_profiler(tmp_path / "on") == ("gperftools CPU profiler:" in said)
    assert links_profiler(tmp_path / "on") != ("building without it" in said)


@needs_cmake
@pytest.mark.build
def test_gperftools_libraries_that_do_not_link_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "deps.cmake"
    script.write_text(f'set(SAGE_GPERFTOOLS_LIBS "{tmp_path}/libprofiler.so")\n')
    said = configure(tmp_path / "b", SAGE_COMMON_DEPS_FILE=str(script), SAGE_ENABLE_GPERFTOOLS="ON")
    assert "no usable libprofiler was found; building without it" in said
    assert not links_profiler(tmp_path / "b")


def build_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "build.sh", *arguments], capture_output=True, text=True)


def test_build_script_teaches_and_refuses_unknown_words() -> None:
    taught = build_sh("--help")
    assert taught.returncode == 0
    for word in ["run", "test", "build", "lint", "bench", "wheel", "--install-deps"]:
        assert re.search(rf"^  {word}\b", taught.stdout, re.MULTILINE), word
    for switch in ["SAGE_SKIP_C_EXTENSIONS", "SAGE_COMMON_DEPS_FILE", "SAGE_ENABLE_GPERFTOOLS"]:
        assert switch in taught.stdout
    for wrong in ["fly", "--fly"]:
        refused = build_sh(wrong)
        assert refused.returncode == 1
        assert f"'{wrong}'" in refused.stderr


def test_version_is_the_same_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", VERSION)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{VERSION}]" in changelog


@pytest.mark.native
def test_native_module_carries_the_version_of_the_package() -> None:
    from sagellm import _core

    assert _core.__version__ == VERSION


@pytest.mark.native
def test_profiler_writes_a_profile_or_says_how_to_get_one(tmp_path: Path) -> None:
    from sagellm import _core
    from sagellm.errors import InvalidArgumentError, UnsupportedError

    profile = tmp_path / "cpu.prof"
    if not _core.profiler.available:
        with pytest.raises(UnsupportedError, match="SAGE_ENABLE_GPERFTOOLS=1"):
            _core.profiler.start(profile)
        return
    _core.profiler.start(profile)
    with pytest.raises(InvalidArgumentError, match="stop a profile"):
        _core.profiler.start(tmp_path / "second.prof")
    _core.profiler.stop()
    assert profile.stat().st_size > 0
    with pytest.raises(InvalidArgumentError, match="can be written"):
        _core.profiler.start(tmp_path / "absent" / "cpu.prof")


@pytest.mark.native
def test_checked_in_stubs_match_the_native_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pybind11_stubgen", "sagellm._core", "-o", str(tmp_path)]
    result = subprocess.run([*command, "--exit-code"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.pyi")}
    kept = ROOT / "typings"
    stored = {p.relative_to(kept): p.read_text() for p in kept.rglob("*.pyi")}
    profiler = Path("sagellm/_core/profiler.pyi")
    for stubs in (fresh, stored):  # whether this build has gperftools is not part of the interface
        stubs[profiler] = stubs[profiler].replace("bool = True", "bool = False")
    assert stored == fresh, "the native module changed: run ./build.sh stubs and review typings/"
