#!/usr/bin/env bash
# Builds sagellm for the GPU of this machine, tests and measures it there. Needs no network: python3 with its headers,
# numpy, pybind11, pytest, hypothesis, cmake, a C++ compiler and nvcc; packages that are missing may lie as wheels in
# SAGELLM_WHEELS. A stage that fails or takes too long leaves the others their turn.
#
#   tests/gpu/run_all.sh [OUTPUT FOLDER]      results: machine.txt build.log tests.json tests.txt benchmark.json
#                                             benchmark.txt sanitizer.txt
#
# SAGELLM_WHEELS=DIR     wheels for this machine's Python of: pydantic pydantic-core annotated-types typing-inspection
#                        gguf llguidance array-api-compat jinja2 tokenizers safetensors hypothesis (what is missing)
# SAGELLM_BUILD=DIR      build folder, default build/gpu
# SAGELLM_STEPS="build test bench sanitize"    which stages to run
# SAGELLM_LIMIT=SECONDS  when to end, default 470
# SAGELLM_CUDA_ARCHS     as for CMake, default: that of the first GPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
OUT=$(mkdir -p "${1:-build/gpu-results}" && cd "${1:-build/gpu-results}" && pwd) || exit 1
BUILD=${SAGELLM_BUILD:-$PWD/build/gpu}
STEPS=" ${SAGELLM_STEPS:-build test bench sanitize} "
LIMIT=${SAGELLM_LIMIT:-470}
PY=${PYTHON:-python3}
STARTED=$SECONDS
STATUS=0
note() { printf '== %3d s  %s\n' $((SECONDS - STARTED)) "$*"; }
die() { printf 'run_all.sh: %s\n' "$*" >&2; exit 1; }
failed() { STATUS=1; note "FAILED: $*"; }
# Seconds for a stage that may take $1.
room() { local left=$((LIMIT - SECONDS + STARTED)); printf '%d' $((left < 1 ? 1 : left < $1 ? left : $1)); }
# Ends with SIGINT, after which Python writes what it has, and ten seconds later with SIGKILL.
limited() { timeout --signal INT --kill-after 10 "$@"; }

{
  uname -srm
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  for tool in nvcc cmake c++ "$PY" compute-sanitizer; do printf '%s: ' "$tool"; command -v "$tool" || echo "not found"; done
  nvcc --version | tail -n 2
  "$PY" --version
} 2>&1 | tee "$OUT/machine.txt"
for tool in cmake c++ "$PY"; do command -v "$tool" >/dev/null || die "$tool was not found"; done

capability() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd 0-9
}
if [[ -z ${SAGELLM_CUDA_ARCHS:-} ]]; then
  CAPABILITY=$(capability)
  [[ -n $CAPABILITY ]] || CAPABILITY=$("$PY" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))' 2>/dev/null)
  [[ -n $CAPABILITY ]] || die "neither nvidia-smi nor torch tells the GPU's compute capability; set SAGELLM_CUDA_ARCHS, such as 90a-real"
  SAGELLM_CUDA_ARCHS=${CAPABILITY/#90/90a}-real
fi

# Packages that only the tests need.
SITE=$BUILD/site
mkdir -p "$SITE"
if [[ -n ${SAGELLM_WHEELS:-} && ! -e $SITE/.done ]]; then
  for wheel in "$SAGELLM_WHEELS"/*.whl; do
    "$PY" -m pip install --quiet --no-index --no-deps --target "$SITE" "$wheel" || note "left out: $(basename "$wheel")"
  done
  touch "$SITE/.done"
fi
export PYTHONPATH="$BUILD/package:$PWD/tests:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

build() {
  local generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$BUILD" ${generator[@]+"${generator[@]}"} -DCMAKE_BUILD_TYPE=Release -DSAGELLM_CUDA=ON \
    -DSAGELLM_CUDA_ARCHS="$SAGELLM_CUDA_ARCHS" -Dpybind11_DIR="$("$PY" -m pybind11 --cmakedir)" \
    -DPython_EXECUTABLE="$(command -v "$PY")" &&
    cmake --build "$BUILD" --target _core _cuda --parallel "$(nproc)"
}
if [[ $STEPS == *" build "* ]]; then
  note "build for $SAGELLM_CUDA_ARCHS"
  build >"$OUT/build.log" 2>&1 ||
    { grep -m 20 -iE 'error|FAILED' "$OUT/build.log" >&2; die "the build failed; the whole text is in $OUT/build.log"; }
fi
# The package as an install would lay it out.
mkdir -p "$BUILD/package"
rm -rf "$BUILD/package/sagellm" "$BUILD/package/sagellm_protocol"
cp -r python/sagellm python/sagellm_protocol "$BUILD/package/"
find "$BUILD" -maxdepth 1 -name '_c*.so' -exec cp {} "$BUILD/package/sagellm/" \;
note "self-test"
limited "$(room 60)" "$PY" -c "
from sagellm.backends.cuda import probe_cuda
from sagellm.backends.nccl import describe_nccl
print(probe_cuda(0))
try:
    print('NCCL', describe_nccl())
except Exception as error:
    print(error)" 2>&1 | tee -a "$OUT/machine.txt" || failed "the self-test; the stages below may say more"

if [[ $STEPS == *" test "* ]]; then
  note "tests"
  SECONDS_LEFT=$(room 150)
  limited $((SECONDS_LEFT + 20)) "$PY" -m gpu.run_tests --out "$OUT" --limit "$SECONDS_LEFT" ||
    failed "tests, see $OUT/tests.txt"
fi
if [[ $STEPS == *" bench "* ]]; then
  note "benchmarks"
  SECONDS_LEFT=$(room 210)
  limited $((SECONDS_LEFT + 20)) "$PY" -m gpu.benchmark --json "$OUT/benchmark.json" --limit "$SECONDS_LEFT" 2>&1 |
    tee "$OUT/benchmark.txt" || failed "benchmarks"
fi
if [[ $STEPS == *" sanitize "* ]]; then
  note "compute-sanitizer"
  : >"$OUT/sanitizer.txt"
  if command -v compute-sanitizer >/dev/null; then
    for TOOL in memcheck racecheck; do
      printf '======== %s\n' "$TOOL" >>"$OUT/sanitizer.txt"
      limited "$(room 70)" compute-sanitizer --tool "$TOOL" --error-exitcode 9 "$PY" -m gpu.small_selection \
        >>"$OUT/sanitizer.txt" 2>&1 || { tail -n 5 "$OUT/sanitizer.txt"; failed "$TOOL: not clean or not finished, see $OUT/sanitizer.txt"; }
    done
  else
    note "compute-sanitizer was not found: left out" | tee -a "$OUT/sanitizer.txt"
  fi
fi
note "done; results in $OUT"
exit "$STATUS"
