#!/usr/bin/env bash
# One command on a machine with a GPU and no network: build for its card, run the gpu-marked tests, then the quick
# benchmarks, inside nine minutes. JSON and logs go to $OUT (./out without it); a short table comes last.
#
#   bench/gpu_check.sh               everything
#   bench/gpu_check.sh --dry-run     check what is needed, print the plan, do nothing
#   bench/gpu_check.sh --build-only  build only, GPU or not (--arch 90a names the card's architecture)
#
# Environment: OUT, PYTHON (python3), MAEFAST_COMMIT and MAEFAST_DIRTY (for a tree without .git), MAEFAST_CHECK_SECONDS (540).
# Exit status: 0 correctness held; 1 it did not (build, tests or a compared result failed); 2 something needed is
# missing; 3 no GPU. Trouble of a benchmark alone is reported and does not change the status.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
TOTAL="${MAEFAST_CHECK_SECONDS:-540}"
MODE=all ARCH=""
while (($#)); do
  case "$1" in
    --dry-run) MODE=dry ;;
    --build-only) MODE=build ;;
    --arch) ARCH="${2:?--arch needs a value, such as 90a}"; shift ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "${OUT:-$ROOT/out}" || exit 2
OUT="$(cd "${OUT:-$ROOT/out}" && pwd)"
BUILD="$ROOT/build/gpu_check"
STAGE="$BUILD/stage"
say() { printf '\n== %s\n' "$*"; }

# --- what is needed ----------------------------------------------------------------------------------------

missing=()
need_command() { command -v "$1" >/dev/null || missing+=("$1: $2"); }
need_module() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2>/dev/null || missing+=("Python module $1: $2"); }
[[ -x /usr/local/cuda/bin/nvcc ]] && ! command -v nvcc >/dev/null && PATH="$PATH:/usr/local/cuda/bin"
need_command "$PYTHON" "set PYTHON to a Python that has torch"
need_command nvcc "the CUDA compiler"
need_command cmake "3.24 or newer"
need_command c++ "a C++17 compiler"
need_command timeout "of coreutils"
need_module torch "2.10 or newer"
need_module pybind11 "to build"
need_module pytest "to test"
need_module hypothesis "to test"
need_module rich "to print tables"
if [[ $MODE != build ]]; then need_module triton "the Triton kernels"; fi
optional=()
for module in transformers xdist; do
  "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2>/dev/null || optional+=("$module")
done
if ((${#missing[@]})); then
  printf 'gpu_check: missing %s\n' "${missing[@]}" >&2
  exit 2
fi
GENERATOR=(); command -v ninja >/dev/null && GENERATOR=(-G Ninja)

# "NVIDIA H100 80GB HBM3|9.0", or why there is none.
GPU="$("$PYTHON" - <<'PY' 2>/dev/null
import torch
if torch.version.cuda is None:
    print(f"none: torch {torch.__version__} is a CPU-only build")
elif not torch.cuda.is_available():
    print(f"none: torch {torch.__version__} sees no CUDA device (driver missing, or CUDA_VISIBLE_DEVICES is empty)")
else:
    print(torch.cuda.get_device_name(), "%d.%d" % torch.cuda.get_device_capability(), sep="|")
PY
)" || GPU="none: torch does not import"
if [[ -z $ARCH ]]; then
  case "$GPU" in
    none:*) ARCH=90a ;;
    *"|9.0") ARCH=90a ;;  # with Hopper's own instructions
    *) ARCH="${GPU##*|}"; ARCH="${ARCH/./}" ;;
  esac
fi

# --- the plan ----------------------------------------------------------------------------------------------

declare -A SECONDS_FOR=([build]=150 [tests]=230 [micro]=80 [step]=50 [dropin]=50)
if [[ $MODE == build ]]; then TOTAL=3600 SECONDS_FOR[build]=3600; fi  # no benchmark waits behind it
TESTS=("$PYTHON" -m pytest tests -m gpu -q -rfE --color=no -p no:cacheprovider "--junitxml=$OUT/gpu_tests.xml")
[[ " ${optional[*]-} " == *" xdist "* ]] || TESTS+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
MICRO=("$PYTHON" -m bench.micro --device cuda --quick --no-compile --budget $((SECONDS_FOR[micro] - 20)) --json "$OUT/micro_cuda.json")
STEP=("$PYTHON" -m bench.step --device cuda --preset vit_b --batch 64 --dtype bfloat16 --budget 20 --json "$OUT/step_cuda.json")
FAMILY=hf_vitmae
[[ " ${optional[*]-} " == *" transformers "* ]] && FAMILY=mae  # the same model, from our own description
DROPIN=("$PYTHON" -m bench.dropin --device cuda --family "$FAMILY" --batch 64 --dtype bfloat16 --budget 15 --json "$OUT/dropin_cuda.json")

say "gpu_check: GPU ${GPU/|/, compute capability }"
"$PYTHON" -c "import sys, torch; print('python', sys.version.split()[0], 'torch', torch.__version__, 'CUDA', torch.version.cuda)"
nvcc --version | grep release
cmake --version | head -1
((${#optional[@]})) && echo "not installed, done without: ${optional[*]}"
echo "tree ${MAEFAST_COMMIT:-$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null || echo '(commit unknown: set MAEFAST_COMMIT)')}, results to $OUT"
echo "plan, $TOTAL s in all:"
printf '  %-6s at most %3d s  %s\n' \
  build "${SECONDS_FOR[build]}" "cmake for architecture $ARCH, into $STAGE" \
  tests "${SECONDS_FOR[tests]}" "${TESTS[*]}" \
  micro "${SECONDS_FOR[micro]}" "${MICRO[*]}" \
  step "${SECONDS_FOR[step]}" "${STEP[*]}" \
  dropin "${SECONDS_FOR[dropin]}" "${DROPIN[*]}"
if [[ $MODE == dry ]]; then
  [[ $GPU == none:* ]] && echo "without --dry-run this would stop here with status 3: no GPU"
  exit 0
fi
if [[ $MODE == all && $GPU == none:* ]]; then
  echo "gpu_check: no GPU here (${GPU#none: }); nothing was built or run. --build-only compiles without one." >&2
  exit 3
fi

# --- doing it ----------------------------------------------------------------------------------------------

LOG="$OUT/gpu_check.log"
: >"$LOG"
declare -A STATUS=() TOOK=()
# part NAME COMMAND...: run under the part's budget and what is left of the whole; everything it says goes to $LOG.
part() {
  local name=$1 limit=${SECONDS_FOR[$1]} left=$((TOTAL - SECONDS)) start=$SECONDS
  shift
  ((left < limit)) && limit=$left
  if ((limit < 10)); then
    STATUS[$name]=skipped TOOK[$name]=0
    echo "== $name: skipped, the time is spent"
    return 1
  fi
  say "$name (at most $limit s)" | tee -a "$LOG"
  timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$LOG" | tail -n "${TAIL:-40}"
  STATUS[$name]=${PIPESTATUS[0]} TOOK[$name]=$((SECONDS - start))
  [[ ${STATUS[$name]} == 124 || ${STATUS[$name]} == 137 ]] && STATUS[$name]=timeout
  echo "== $name: status ${STATUS[$name]}, ${TOOK[$name]} s"
  [[ ${STATUS[$name]} == 0 ]]
}

# A copy of the tree with the libraries and maefast.kernels in place: needs no pip and changes no environment.
build() {
  set -e
  rm -rf "$STAGE" && mkdir -p "$STAGE"
  cmake -S "$ROOT" -B "$BUILD/cmake" "${GENERATOR[@]}" -DCMAKE_BUILD_TYPE=Release -DMAEFAST_CUDA=on \
    "-DMAEFAST_CUDA_ARCHS=$ARCH" -DMAEFAST_INSTALL_PYTHON=ON "-DPython_EXECUTABLE=$(command -v "$PYTHON")"
  cmake --build "$BUILD/cmake" --parallel "${MAEFAST_JOBS:-$(nproc)}"
  cmake --install "$BUILD/cmake" --prefix "$STAGE"
  (cd "$ROOT" && tar cf - --exclude=__pycache__ --exclude=bench/results pyproject.toml tests bench kernels csrc) | tar xf - -C "$STAGE"
  mkdir -p "$STAGE/bench/results"
  cd "$STAGE"
  # An editable install of maefast goes before every path; within the stage it must not.
  cat >sitecustomize.py <<'PY'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
PY
  "$PYTHON" - <<'PY'
from pathlib import Path

import torch

import maefast.kernels
import maefast.ops  # loads the libraries
from maefast import _native

assert Path(maefast.__file__).parent == Path("maefast").resolve(), f"another maefast is in the way: {maefast.__file__}"
status = _native.status()
print("libraries:", status)
assert status["C"] and status["cpu"], status["error"]
assert Path("maefast/_cuda.so").exists(), "the CUDA library was not built"
assert status["cuda"] or torch.version.cuda is None, status["cuda_note"]
PY
}
export BUILD STAGE ROOT PYTHON ARCH
build_script="$(declare -f build); GENERATOR=(${GENERATOR[*]-}); build"
export MAEFAST_REQUIRE_NATIVE=1 PYTHONPATH="$STAGE" PYTHONUNBUFFERED=1
if [[ -z ${MAEFAST_COMMIT:-} ]] && MAEFAST_COMMIT="$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null)"; then
  MAEFAST_DIRTY=0
  [[ -z $(git -C "$ROOT" status --porcelain -- maefast csrc kernels bench CMakeLists.txt ':!bench/results') ]] || MAEFAST_DIRTY=1
fi
export MAEFAST_COMMIT="${MAEFAST_COMMIT:-}" MAEFAST_DIRTY="${MAEFAST_DIRTY:-}"

TAIL=12 part build bash -c "$build_script"
if [[ $MODE == build || ${STATUS[build]} != 0 ]]; then
  [[ ${STATUS[build]} == 0 ]] && echo "gpu_check: the build works; nothing was run" && exit 0
  echo "gpu_check: the build failed; see $LOG" >&2
  exit 1
fi
cd "$STAGE" || exit 1
"$PYTHON" -m maefast.cli doctor --json >"$OUT/doctor.json" 2>>"$LOG" || echo "maefast doctor failed; see $LOG"
TAIL=30 part tests "${TESTS[@]}"
part micro "${MICRO[@]}"
part step "${STEP[@]}"
part dropin "${DROPIN[@]}"

# --- the verdict, last -------------------------------------------------------------------------------------

say "summary"
"$PYTHON" -m bench.gpu_summary "$OUT" \
  "build=${STATUS[build]}:${TOOK[build]}" "tests=${STATUS[tests]}:${TOOK[tests]}" \
  "micro=${STATUS[micro]}:${TOOK[micro]}" "step=${STATUS[step]}:${TOOK[step]}" \
  "dropin=${STATUS[dropin]}:${TOOK[dropin]}"
