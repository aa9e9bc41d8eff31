#!/usr/bin/env bash
# Builds sagellm for the GPU of this machine, tests and measures it there. Needs no network: python3 with numpy, torch,
# pybind11, pytest, cmake and nvcc; packages that are missing may lie as wheels in SAGELLM_WHEELS.
#
#   tests/gpu/run_all.sh [OUTPUT FOLDER]      results: tests.xml, sanitizer.txt, benchmark.json, benchmark.txt
#
# SAGELLM_WHEELS=DIR   wheels of: pydantic pydantic-core annotated-types typing-inspection gguf llguidance
#                      array-api-compat jinja2 tokenizers safetensors hypothesis (those that are not installed)
# SAGELLM_BUILD=DIR    build folder, default build/gpu
# SAGELLM_STEPS="build test sanitize bench"    which parts to run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=$(mkdir -p "${1:-build/gpu-results}" && cd "${1:-build/gpu-results}" && pwd)
BUILD=${SAGELLM_BUILD:-$PWD/build/gpu}
STEPS=" ${SAGELLM_STEPS:-build test sanitize bench} "
PY=${PYTHON:-python3}
STARTED=$SECONDS
note() { printf '== %3d s  %s\n' $((SECONDS - STARTED)) "$*"; }
die() { printf 'run_all.sh: %s\n' "$*" >&2; exit 1; }

command -v nvidia-smi >/dev/null || die "nvidia-smi was not found; this script needs an NVIDIA GPU and its driver"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$OUT/machine.txt"
CAPABILITY=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n1 | tr -d '. ')
case $CAPABILITY in
  90) ARCH=90a-real ;;
  *) ARCH=$CAPABILITY-real ;;
esac

# Packages that only the tests need.
SITE=$BUILD/site
mkdir -p "$SITE"
if [[ -n ${SAGELLM_WHEELS:-} && ! -e $SITE/.done ]]; then
  for wheel in "$SAGELLM_WHEELS"/*.whl; do
    "$PY" -m pip install --quiet --no-index --no-deps --target "$SITE" "$wheel" || note "left out: $(basename "$wheel")"
  done
  touch "$SITE/.done"
fi
export PYTHONPATH="$BUILD/package:$PWD/tests:$SITE${PYTHONPATH:+:$PYTHONPATH}"

if [[ $STEPS == *" build "* ]]; then
  note "build for $ARCH"
  GENERATOR=()
  if command -v ninja >/dev/null; then GENERATOR=(-G Ninja); fi
  cmake -S . -B "$BUILD" "${GENERATOR[@]}" -DCMAKE_BUILD_TYPE=Release -DSAGELLM_CUDA=ON -DSAGELLM_CUDA_ARCHS="$ARCH" \
    -Dpybind11_DIR="$("$PY" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v "$PY")" >"$OUT/cmake.log" 2>&1 ||
    { tail -n 30 "$OUT/cmake.log" >&2; die "CMake failed; the whole text is in $OUT/cmake.log"; }
  cmake --build "$BUILD" --target _core _cuda --parallel "$(nproc)" >"$OUT/build.log" 2>&1 ||
    { tail -n 40 "$OUT/build.log" >&2; die "the build failed; the whole text is in $OUT/build.log"; }
fi
# The package as an install would lay it out.
mkdir -p "$BUILD/package"
rm -rf "$BUILD/package/sagellm" "$BUILD/package/sagellm_protocol"
cp -r python/sagellm "$BUILD/package/"
if [[ -d python/sagellm_protocol ]]; then cp -r python/sagellm_protocol "$BUILD/package/"; fi
find "$BUILD" -maxdepth 1 -name '_c*.so' -exec cp {} "$BUILD/package/sagellm/" \;
"$PY" -c "
from sagellm.backends.cuda import probe_cuda
print(probe_cuda(0))"

STATUS=0
if [[ $STEPS == *" test "* ]]; then
  note "tests"
  IGNORED=()
  "$PY" -c "import pydantic, gguf, llguidance" 2>/dev/null ||
    { IGNORED=(--ignore tests/cuda/test_engine.py); note "tests/cuda/test_engine.py left out: it needs pydantic, gguf, llguidance (SAGELLM_WHEELS)"; }
  timeout 180 "$PY" -m pytest tests/cuda -m cuda -q -p no:cacheprovider "${IGNORED[@]}" --junitxml "$OUT/tests.xml" || STATUS=1
fi
if [[ $STEPS == *" sanitize "* ]]; then
  note "compute-sanitizer"
  if command -v compute-sanitizer >/dev/null; then
    for TOOL in memcheck racecheck; do
      timeout 60 compute-sanitizer --tool "$TOOL" --error-exitcode 9 "$PY" -m gpu.small_selection >"$OUT/$TOOL.txt" 2>&1 ||
        { STATUS=1; tail -n 5 "$OUT/$TOOL.txt"; note "$TOOL: not clean or not finished, see $OUT/$TOOL.txt"; }
    done
  else
    note "compute-sanitizer was not found: left out"
  fi
fi
if [[ $STEPS == *" bench "* ]]; then
  note "benchmarks"
  timeout 240 "$PY" -m gpu.benchmark --json "$OUT/benchmark.json" 2>&1 | tee "$OUT/benchmark.txt" || STATUS=1
fi
note "done; results in $OUT"
exit "$STATUS"
