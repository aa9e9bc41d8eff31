"""Who may include or import whom, and what must never appear in the source."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP = ROOT / "cpp" / "sagellm"
PYTHON = ROOT / "python"

# For each C++ folder, the folders whose headers it may include besides its own.
_FOUNDATION = {"base", "tensor"}
CPP_DOORS: dict[str, set[str]] = {
    "base": set(),
    "tensor": {"base"},
    "kernels": _FOUNDATION,
    "quant": _FOUNDATION | {"kernels"},
    "runtime": _FOUNDATION | {"kernels", "quant"},
    "checkpoint": _FOUNDATION | {"kernels", "quant", "runtime"},
    "text": _FOUNDATION | {"checkpoint"},
    "comm": _FOUNDATION | {"runtime"},
    "kv": _FOUNDATION | {"kernels", "quant", "runtime"},
    "sample": _FOUNDATION | {"kernels", "quant", "runtime"},
    "ops": _FOUNDATION | {"kernels", "quant", "runtime", "kv", "comm"},
    "model": _FOUNDATION
    | {"kernels", "quant", "runtime", "kv", "comm", "ops", "sample", "checkpoint"},
    "cuda": _FOUNDATION
    | {"kernels", "quant", "runtime", "kv", "comm", "ops", "sample", "checkpoint", "model"},
    "bench": _FOUNDATION | {"kernels", "quant", "runtime", "kv", "sample", "model"},
}
ISA_HEADERS = {
    "immintrin.h",
    "cstdint",
    "cstddef",
    "sagellm/kernels/params.h",
    "avx512_emulation.h",  # tests only: AVX-512 on machines without it
}
# An instruction set may use the folders of those that it contains.
ISA_PARTS = {"avx512": {"avx2"}, "avx512_bf16": {"avx2", "avx512"}}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)

# Imports inside functions: only what an install may lack, and modules that cannot load without it.
OPTIONAL_IMPORTS = {
    "aiohttp",
    "opentelemetry",
    "torch",
    "torch_npu",
    "huggingface_hub",
    "matplotlib",
    "array_api_compat",
}
# And what takes long to load and is seldom needed, by the only file that may put it off.
LATE_IMPORTS = {
    "rich": "python/sagellm/terminal.py",  # draws a bar when a download begins
    "llguidance": "python/sagellm/engine/grammar.py",  # start-up: most requests have no grammar
}
NATIVE_MODULES = ("sagellm._core", "sagellm.backends.cpu")
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 600


def cpp_files() -> list[Path]:
    return sorted(p for p in CPP.rglob("*") if p.suffix in {".h", ".cc", ".inc", ".cu", ".cuh"})


def python_files() -> list[Path]:
    return sorted(PYTHON.rglob("*.py"))


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def relative(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def test_cpp_folders_include_only_through_their_doors() -> None:
    wrong = []
    for path in cpp_files():
        folder = path.relative_to(CPP).parts[0]
        assert folder in CPP_DOORS, f"give cpp/sagellm/{folder} its doors in CPP_DOORS"
        for header in includes(path):
            if header.startswith("sagellm/"):
                target = header.split("/")[1]
                if target != folder and target not in CPP_DOORS[folder]:
                    wrong.append(f"{path.relative_to(ROOT)}: {header}")
            elif header.startswith("pybind11/"):
                wrong.append(f"{path.relative_to(ROOT)}: {header} (only cpp/bindings knows Python)")
    assert not wrong, "\n".join(wrong)


def test_cpp_doors_have_no_cycle() -> None:
    visiting: list[str] = []

    def visit(folder: str) -> None:
        assert folder not in visiting, f"cycle: {visiting} -> {folder}"
        visiting.append(folder)
        for target in CPP_DOORS[folder]:
            visit(target)
        visiting.pop()

    for folder in CPP_DOORS:
        visit(folder)


def test_isa_files_see_only_params_and_code_of_their_own_instruction_set() -> None:
    """Follows includes: headers directly in kernels/cpu are text that each ISA compiles itself."""
    cpu = CPP / "kernels" / "cpu"
    wrong = []
    waiting = [(p, p.parent.name) for p in cpp_files() if p.match("kernels/cpu/*/*")]
    seen = set(waiting)
    while waiting:
        path, isa = waiting.pop()
        for header in includes(path):
            if header in ISA_HEADERS:
                continue
            beside = (path.parent / header).resolve()
            found = beside if beside.is_file() else CPP.parent / header
            folder = "" if found.parent == cpu else found.parent.name
            inside = found.is_file() and found.is_relative_to(cpu)
            if not inside or folder not in {"", isa, *ISA_PARTS.get(isa, set())}:
                wrong.append(f"{path.relative_to(ROOT)} ({isa}): {header}")
            elif (found, isa) not in seen:
                seen.add((found, isa))
                waiting.append((found, isa))
    assert not wrong, "\n".join(wrong)


def test_cuda_kernels_are_written_in_the_platform_layer_alone() -> None:
    """Launch headers know no CUDA; kernels know CUDA through platform.cuh, so that they emulate."""
    folder = CPP / "kernels" / "cuda"
    wrong = []
    for path in cpp_files():
        if path.parent != folder:
            continue
        for header in includes(path):
            known = header.startswith("sagellm/") or "." not in header  # the standard library
            if path.name == "platform.cuh" and header == "cuda_emulator.h":
                known = True
            if path.suffix in {".h", ".cc"} and header.endswith(".cuh"):
                known = False
            if not known:
                wrong.append(f"{path.relative_to(ROOT)}: {header}")
        kernel = path.suffix in {".cu", ".cuh"}
        if kernel and re.search(r"__shared__(?! __align__)|<<<", path.read_text()):
            wrong.append(f"{path.relative_to(ROOT)}: static shared memory or <<<>>>")
    assert not wrong, "\n".join(wrong)


def run_gate(objects: list[Path]) -> subprocess.CompletedProcess[str]:
    listed = ";".join(map(str, objects))
    script = ROOT / "cmake" / "check_no_weak_symbols.cmake"
    command = ["cmake", f"-DNM={shutil.which('nm')}", f"-DOBJECTS={listed}", "-P", str(script)]
    return subprocess.run(command, capture_output=True, text=True)


def compile_object(folder: Path, name: str, source: str) -> Path:
    (folder / f"{name}.cc").write_text(source)
    output = folder / f"{name}.o"
    command = ["g++", "-std=c++20", "-O0", "-c", str(folder / f"{name}.cc"), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


@pytest.mark.build
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs a compiler")
def test_weak_symbol_gate_tells_clean_objects_from_leaking_ones(tmp_path: Path) -> None:
    sources = {
        "clean": "namespace { int f() { return 1; } } int g() { return f(); }",
        "inline": "inline int f() { return 1; } int g() { return f(); }",
        "template": "template <class T> T f(T x) { return x; } int g() { return f(1); }",
        "constructor": "int h(); namespace { int x = h(); } int g() { return x; }",
    }
    compiled = {name: compile_object(tmp_path, name, text) for name, text in sources.items()}
    clean = compiled["clean"]
    assert run_gate([clean]).returncode == 0
    symbols = {"inline": "W _Z1fv", "template": "W _Z1fIiE", "constructor": "t _GLOBAL__sub_I"}
    for name, symbol in symbols.items():
        result = run_gate([clean, compiled[name]])
        assert result.returncode != 0, name
        assert symbol in result.stderr


def test_python_layers_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run(
        [*command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PYTHON), "PATH": "", "COLUMNS": "100"},
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_imports_only_the_native_core_and_the_version_from_its_root() -> None:
    wrong = []
    for path in (PYTHON / "sagellm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "sagellm":
                for name in {alias.name for alias in node.names} - {"_core", "__version__"}:
                    if not list((PYTHON / "sagellm").glob(f"{name}*")):
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)


def nested_imports(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found += [(node.lineno, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_no_import_hides_in_a_function_unless_optional() -> None:
    wrong = []
    for path in python_files():
        for line, name in nested_imports(ast.parse(path.read_text())):
            native = f"{name}.".startswith(tuple(f"{module}." for module in NATIVE_MODULES))
            package = name.split(".")[0]
            late = LATE_IMPORTS.get(package) == str(path.relative_to(ROOT))
            if not native and not late and package not in OPTIONAL_IMPORTS:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


def test_python_modules_postpone_annotations() -> None:
    wrong = [
        path
        for path in python_files()
        if re.search(r"^(def|class) ", path.read_text(), re.MULTILINE)
        and "from __future__ import annotations" not in path.read_text()
    ]
    assert not wrong, relative(wrong)


def test_functions_and_files_stay_readable() -> None:
    wrong = []
    for path in python_files():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {length}")
    assert not wrong, "\n".join(wrong)


def project_files() -> list[Path]:
    folders = ["cmake", "cpp", "docs", "python", "tests", ".ci"]
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    suffixes = {
        ".cc",
        ".h",
        ".inc",
        ".cu",
        ".cuh",
        ".cmake",
        ".py",
        ".pyi",
        ".md",
        ".toml",
        ".sh",
        ".txt",
        "",
    }
    return sorted(p for p in files if p.suffix in suffixes and "__pycache__" not in p.parts)


def test_no_machine_path_or_package_mirror_in_the_project() -> None:
    # Spelled in pieces, so that this file passes its own test.
    places = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/op" + "t/"]
    places += ["find-" + "links", "index-" + "url"]
    pattern = re.compile("|".join(places))
    wrong = []
    for path in project_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not wrong, "\n".join(wrong)


def test_no_file_has_architecture_or_fast_math_flags() -> None:
    pattern = re.compile(r"-m(arch|tune)=native|-ffast-math|-fassociative-math|-Ofast")
    build_files = [ROOT / "CMakeLists.txt", ROOT / "build.sh", *(ROOT / "cmake").glob("*")]
    build_files += [ROOT / "tests" / "cpp" / "CMakeLists.txt", ROOT / "pyproject.toml"]
    wrong = [p for p in build_files if pattern.search(p.read_text())]
    assert not wrong, relative(wrong)


def test_no_assert_or_abort_in_the_core() -> None:
    pattern = re.compile(r"(?<![_\w])(assert|abort|std::terminate|exit)\s*\(")
    wrong = []
    for path in cpp_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if pattern.search(code):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)
