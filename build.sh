#!/usr/bin/env bash
# Sets up, builds, checks and runs sagellm. Asks no questions; `./build.sh --help` explains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${SAGELLM_VENV:-.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
PY=$VENV/bin/python
BASE_PYTHON=${PYTHON:-python3}
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH=$VENV/bin:$PATH  # CMake and ninja live there where the system has none

usage() {
  cat <<'TEXT'
Usage: ./build.sh [--install-deps] [COMMAND [ARGUMENTS]]

Commands
  run [MODEL] [OPTIONS]   install what is missing, then answer a prompt:
                            ./build.sh run
                            ./build.sh run -p "Name three rivers."
                            ./build.sh run gemma3-270m -p "Name three rivers." --max-tokens 64
                          OPTIONS are those of `sagellm run`; the default model is smollm2
  test [PYTEST OPTIONS]   every check: lint, types, C++ tests under sanitizers, ISA gate, fuzzing,
                          install tests, pytest
  build                   editable install into .venv; later edits of C++ rebuild on import
  lint                    formatters and linters only (add --fix to apply)
  bench [CASE] [OPTIONS]  python -m sagellm.bench (default case: offline on smollm2)
  clients FOLDER [CLIENT...]
                          third-party clients (litellm, langchain-openai, instructor, lm-eval), each
                          in a virtual environment under FOLDER, against a server with real models
  wheel                   source archive and wheel into dist/
  stubs                   regenerate the type stubs of the native module in typings/

Options
  --install-deps          install system packages first (as root or with passwordless sudo; otherwise
                          prints the one command to run); alone, that is all it does
  --help                  this text

Environment
  SAGE_SKIP_C_EXTENSIONS=1      pure-Python install: no compiler, reference backend
  SAGE_COMMON_DEPS_FILE=FILE    CMake script that provides shared dependencies
  SAGE_ENABLE_GPERFTOOLS=1      link the CPU profiler, for `sagellm bench --profile OUT`
  CMAKE_ARGS="-D..."            more arguments for CMake
  PYTHON=python3.12             interpreter that creates .venv (3.10 or newer)
  SAGELLM_VENV=DIR              another place for .venv
  SAGELLM_FUZZ_SECONDS=20       time for each fuzz target in `test`
  CMAKE_BUILD_PARALLEL_LEVEL=N  compiler processes (default: all cores)
TEXT
}

die() { printf 'build.sh: %s\n' "$*" >&2; STAGE=; exit 1; }
pure() { case "${SAGE_SKIP_C_EXTENSIONS:-}" in 1 | [Tt]rue | TRUE | [Oo]n | ON | [Yy]es) return 0 ;; esac; return 1; }

# ------------------------------------------------------------------------------- system packages

# Prints the Debian packages that `purpose` (run or test) still needs, judged by what works, not by names.
missing_packages() {
  local purpose=$1
  command -v "$BASE_PYTHON" >/dev/null || { echo python3 python3-venv python3-dev; BASE_PYTHON=; }
  [[ -z $BASE_PYTHON || -x $PY ]] || "$BASE_PYTHON" -c 'import ensurepip' 2>/dev/null || echo python3-venv
  [[ $purpose == run ]] && pure && return 0
  command -v "${CXX:-g++}" >/dev/null || echo g++
  [[ -z $BASE_PYTHON ]] || "$BASE_PYTHON" -c \
    'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
    echo python3-dev
  case "${SAGE_ENABLE_GPERFTOOLS:-}" in "" | 0 | [Oo]ff | OFF | [Ff]alse) ;; *)
    [[ -n $(compgen -G '/usr/lib*/libprofiler.so' || compgen -G '/usr/lib/*/libprofiler.so') ]] || echo libgoogle-perftools-dev ;;
  esac
  [[ $purpose == test ]] || return 0
  [[ -f /usr/include/gtest/gtest.h ]] || echo libgtest-dev
  [[ -f /usr/include/simde/x86/avx512.h ]] || echo libsimde-dev
}

apt_install() {
  local root=()
  [[ $(id -u) == 0 ]] || root=(sudo -n)
  local run=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q)
  "${run[@]}" update >/dev/null && "${run[@]}" install -y --no-install-recommends "$@"
}

can_install() { command -v apt-get >/dev/null && { [[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null; }; }

ensure_packages() {
  local packages
  mapfile -t packages < <(missing_packages "$1" | tr ' ' '\n' | sort -u)
  [[ ${#packages[@]} == 0 ]] && return 0
  can_install || die "system packages are missing. Run this once, then repeat:
    sudo apt-get update && sudo apt-get install -y ${packages[*]}
  (on a system without apt, install their equivalents${2:-})"
  printf 'Installing system packages: %s\n' "${packages[*]}"
  apt_install "${packages[@]}"
}

# clang is wanted for fuzzing only: its absence is reported by that stage and stops nothing.
ensure_fuzzer() {
  command -v clang++ >/dev/null || command -v clang++-14 >/dev/null || ! can_install ||
    apt_install clang libclang-rt-14-dev ||
    printf 'clang could not be installed; the fuzz stage will be skipped\n'
}

# --------------------------------------------------------------------------------------- install

ensure_venv() {
  [[ -x $PY ]] && return 0
  "$BASE_PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' ||
    die "sagellm needs Python 3.10 or newer; name one with PYTHON=python3.11 ./build.sh ..."
  "$BASE_PYTHON" -m venv "$VENV"
}

new_cmake() {
  local version
  version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
  [[ $(printf '3.24\n%s\n' "${version:-0}" | sort -V | head -n1) == 3.24 ]]
}

# Editable install with the extras given ("" or "dev"), unless the last one is still good.
install() {
  local extras=$1 mode=native stamp=$VENV/.sagellm-install key
  pure && mode=pure
  key=$(printf '%s|' "$PWD" "$mode" "${SAGE_COMMON_DEPS_FILE:-}" "${SAGE_ENABLE_GPERFTOOLS:-}" \
    "${CMAKE_ARGS:-}" | cat - pyproject.toml | sha256sum)
  ensure_venv
  if [[ $extras == "" ]]; then
    [[ -f $stamp && $(head -n1 "$stamp") == "$key" ]] && return 0
  else
    [[ -f $stamp && $(cat "$stamp") == "$key"$'\n'"$extras" ]] && return 0
  fi
  printf 'Installing sagellm (%s) into %s\n' "$mode" "$VENV"
  # The build tools live in .venv, because an editable install calls them again after edits.
  local tools=("scikit-build-core>=0.10" "pybind11>=2.12")
  if [[ $mode == native ]]; then
    new_cmake || tools+=("cmake>=3.24")
    command -v ninja >/dev/null || tools+=(ninja)
  fi
  "$PY" -m pip install -q "${tools[@]}"
  "$PY" -m pip install -q --no-build-isolation -e ".${extras:+[$extras]}"
  printf '%s\n%s\n' "$key" "$extras" >"$stamp"
}

# ---------------------------------------------------------------------------------------- stages

STAGE=setup
trap '[[ $? == 0 || -z $STAGE ]] || printf "\nbuild.sh: FAILED in stage: %s\n" "$STAGE" >&2' EXIT

stage() {
  STAGE=$1
  local started=$SECONDS
  printf '\n=== %s\n' "$STAGE"
  "${@:2}"
  printf -- '--- %s: %d s\n' "$STAGE" $((SECONDS - started))
}

cpp_files() { find cpp tests/cpp -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort; }

lint() {
  local check=(--check) dry=(--dry-run -Werror) fix=()
  [[ ${1:-} == --fix ]] && check=() dry=(-i) fix=(--fix)
  "$PY" -m ruff check "${fix[@]}" .
  "$PY" -m ruff format "${check[@]}" .
  cpp_files | xargs "$VENV/bin/clang-format" "${dry[@]}"
}

configure() {  # configure FOLDER BUILD_TYPE ARGUMENTS...
  cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE="$2" -DSAGELLM_BUILD_PYTHON=OFF "${@:3}" >"$1.log" 2>&1 ||
    { cat "$1.log"; return 1; }
}

cpp_tests() {
  mkdir -p build
  configure build/asan RelWithDebInfo -DSAGELLM_BUILD_TESTS=ON -DSAGELLM_WERROR=ON \
    -DSAGELLM_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"
  cmake --build build/asan
  ctest --test-dir build/asan --output-on-failure --no-tests=error
}

isa_gate() {  # without optimisation every inline function is emitted, so a leak cannot hide
  mkdir -p build
  configure build/debug Debug
  cmake --build build/debug --target check_isa_symbols
}

fuzz() {
  local clang
  clang=$(command -v clang++ || command -v clang++-14) ||
    { printf 'SKIPPED: no clang++ (Debian: apt-get install clang libclang-rt-14-dev)\n'; return 0; }
  mkdir -p build
  CXX=$clang configure build/fuzz RelWithDebInfo -DSAGELLM_BUILD_FUZZERS=ON \
    -DSAGELLM_SANITIZE=address,undefined -DSAGELLM_FUZZ_SECONDS="${SAGELLM_FUZZ_SECONDS:-20}" \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"
  cmake --build build/fuzz
  ctest --test-dir build/fuzz --output-on-failure --no-tests=error
}

fresh_venv() { rm -rf "$1" && "$PY" -m venv "$1"; }

pure_install() {  # CC and CXX fail, so a build that calls a compiler cannot pass
  fresh_venv build/venv-pure
  SAGE_SKIP_C_EXTENSIONS=1 CC=false CXX=false build/venv-pure/bin/python -m pip install -q .
  (cd build && SAGELLM_EXPECT=pure venv-pure/bin/python ../tests/install_smoke.py)
}

wheel() {
  rm -rf dist
  "$PY" -c 'from scikit_build_core.build import build_sdist; build_sdist("dist")'
  "$PY" -m pip wheel -q --no-deps -w dist dist/sagellm-*.tar.gz  # from the archive: it must be complete
  ls -l dist
}

wheel_smoke() {  # machine code for one device is enough here; the editable install built all of it
  CMAKE_ARGS="-DSAGELLM_CUDA_ARCHS=90a-real ${CMAKE_ARGS:-}" wheel
  fresh_venv build/venv-wheel
  build/venv-wheel/bin/python -m pip install -q dist/sagellm-*.whl
  (cd build && SAGELLM_EXPECT=$(pure && echo pure || echo native) venv-wheel/bin/python ../tests/install_smoke.py)
}

run_pytest() { SAGELLM_REQUIRE_NATIVE=1 "$PY" -m pytest "$@"; }

run_tests() {
  stage "install (editable)" install dev
  stage "lint" lint
  stage "types (mypy --strict)" "$PY" -m mypy
  stage "C++ tests (ASan, UBSan)" cpp_tests
  stage "weak-symbol gate (Debug)" isa_gate
  stage "fuzzing" fuzz
  stage "pure-Python install" pure_install
  stage "wheel install" wheel_smoke
  stage "pytest" run_pytest "$@"
}

stubs() {
  rm -rf typings build/stubs
  "$PY" -m pybind11_stubgen sagellm._core -o build/stubs --exit-code
  mkdir -p typings && cp -r build/stubs/sagellm typings/sagellm
}

run_model() {
  local model=smollm2 argument prompt=(-p "Why is the sky blue? Answer in two sentences.")
  [[ $# == 0 || $1 == -* ]] || { model=$1; shift; }
  for argument in "$@"; do
    [[ $argument == -p || $argument == --prompt || $argument == --prompt=* || $argument == --help ]] && prompt=()
  done
  exec "$VENV/bin/sagellm" run "$model" "${prompt[@]}" "$@"
}

run_bench() {
  [[ $# == 0 || $1 == -* ]] && set -- offline "$@"
  [[ $1 == offline && " $* " != *" --model"* ]] && set -- "$@" --model smollm2
  exec "$PY" -m sagellm.bench "$@"
}

# ------------------------------------------------------------------------------------------ main

deps=0
while [[ ${1:-} == --* ]]; do
  case $1 in
    --install-deps) deps=1 ;;
    --help) usage; exit 0 ;;
    *) usage >&2; die "unknown option '$1'" ;;
  esac
  shift
done
command=${1:-}
[[ $# == 0 ]] || shift
if [[ -z $command ]]; then
  [[ $deps == 1 ]] || { usage; exit 0; }
  ensure_packages test
  ensure_fuzzer
  exit 0
fi

skip_hint=', or install without a compiler: SAGE_SKIP_C_EXTENSIONS=1 ./build.sh run'
case $command in
  run) ensure_packages run "$skip_hint"; install ""; run_model "$@" ;;
  build) ensure_packages run; install dev ;;
  test)
    ensure_packages test
    [[ $deps == 0 ]] || ensure_fuzzer
    run_tests "$@" ;;
  lint) ensure_packages run; install dev; stage lint lint "$@" ;;
  bench) ensure_packages run; install ""; run_bench "$@" ;;
  clients) ensure_packages run; install dev; PYTHON=$PY exec tests/clients/run.sh "$@" ;;
  wheel) ensure_packages run; install dev; wheel ;;
  stubs) ensure_packages run; install dev; stubs ;;
  help) usage ;;
  *) usage >&2; die "unknown command '$command'" ;;
esac
