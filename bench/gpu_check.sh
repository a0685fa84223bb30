#!/usr/bin/env bash
# One command on a machine with a GPU and no network: build for its card, run every kernel once, time what matters, run
# the gpu-marked tests, make the dispatch tables. docs/gpu.md says how to spend fifteen minutes with it.
#
#   bench/gpu_check.sh [STAGE ...]   build smoke speed all-tests tune; all of them without an argument
#     --dry-run          check what is needed, print the plan, do nothing
#     --build-only       build only, GPU or not (--arch 90a names the card's architecture)
#     --rehearse         the same stages without a GPU: Triton's interpreter, toy sizes, CPU timing
#     --libraries DIR    take the libraries that are in DIR (_cpu.so, _cuda.so, _C.abi3.so), compile only the others
#     --lines FILE       go on after the results in FILE (on a machine that still has build/gpu_check: by itself)
#
# Results are appended to $OUT/gpu_check.jsonl (./out without OUT), one line each; what passed is not run again.
# Environment: OUT, PYTHON (python3), MAEFAST_COMMIT and MAEFAST_DIRTY (for a tree without .git), MAEFAST_CHECK_LIBRARIES
# (as --libraries), MAEFAST_CHECK_SECONDS for all stages (540).
# Exit status: 0 correctness held; 1 it did not (build, smoke, tests or a compared result failed); 2 something needed is
# missing; 3 no GPU. Trouble of a measurement alone is reported and does not change the status.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
TOTAL="${MAEFAST_CHECK_SECONDS:-540}"
PREBUILT="${MAEFAST_CHECK_LIBRARIES:-}" # not LIBRARIES, which nvcc reads
MODE=all DRY="" ARCH="" EARLIER="" ORDER=(build smoke speed all-tests tune) CHOSEN=()
while (($#)); do
  case "$1" in
    build | smoke | speed | all-tests | tune) CHOSEN+=("$1") ;;
    --dry-run) DRY=1 ;;
    --build-only) MODE=build CHOSEN=(build) ;;
    --rehearse) MODE=rehearse ;;
    --arch) ARCH="${2:?--arch needs a value, such as 90a}"; shift ;;
    --libraries) PREBUILT="${2:?--libraries needs a folder}"; shift ;;
    --lines) EARLIER="${2:?--lines needs a file}"; shift ;;
    -h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
((${#CHOSEN[@]})) || CHOSEN=("${ORDER[@]}")
chosen() { [[ " ${CHOSEN[*]} " == *" $1 "* ]]; }
mkdir -p "${OUT:-$ROOT/out}" || exit 2
OUT="$(cd "${OUT:-$ROOT/out}" && pwd)"
BUILD="$ROOT/build/gpu_check"
[[ $MODE == rehearse ]] && BUILD="$ROOT/build/gpu_rehearsal"
STAGE="$BUILD/stage"
say() { printf '\n== %s\n' "$*"; }

# --- what is needed ----------------------------------------------------------------------------------------

missing=()
need_command() { command -v "$1" >/dev/null || missing+=("$1: $2"); }
need_module() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2>/dev/null || missing+=("Python module $1: $2"); }
[[ -x /usr/local/cuda/bin/nvcc ]] && ! command -v nvcc >/dev/null && PATH="$PATH:/usr/local/cuda/bin"
need_command "$PYTHON" "set PYTHON to a Python that has torch"
if [[ $MODE == rehearse && -z $PREBUILT ]]; then # those of the installed package
  PREBUILT="$("$PYTHON" -c 'from maefast import _native; print(_native.find_library("cpu").parent)' 2>/dev/null)" || PREBUILT=""
fi
[[ -z $PREBUILT || -d $PREBUILT ]] || missing+=("$PREBUILT: no such folder of libraries")
[[ -d $PREBUILT ]] && PREBUILT="$(cd "$PREBUILT" && pwd)"
[[ -z $EARLIER || -f $EARLIER ]] || missing+=("$EARLIER: no such file of results")
TARGETS=() # what no folder of libraries brings
for target in _C _cpu _cuda; do
  name="$target.so"; [[ $target == _C ]] && name=_C.abi3.so
  [[ $target == _cuda && $MODE == rehearse ]] && continue
  [[ -n $PREBUILT && -f $PREBUILT/$name ]] || TARGETS+=("$target")
done
if ((${#TARGETS[@]})); then
  [[ $MODE == rehearse ]] || need_command nvcc "the CUDA compiler"
  need_command cmake "3.24 or newer"
  need_command c++ "a C++17 compiler"
fi
need_command timeout "of coreutils"
need_module torch "2.10 or newer"
need_module pytest "to test"
need_module hypothesis "to test"
need_module rich "to print tables"
if [[ $MODE != build ]]; then need_module triton "the Triton kernels"; fi
if ((${#missing[@]})); then
  printf 'gpu_check: missing %s\n' "${missing[@]}" >&2
  exit 2
fi
optional=()
for module in transformers; do
  "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2>/dev/null || optional+=("$module")
done
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

NAME=gpu_check TABLES="$OUT/dispatch_data.json" TOY=()
if [[ $MODE == rehearse ]]; then NAME=gpu_rehearsal TABLES="$OUT/gpu_rehearsal_tables.json" TOY=(--rehearse); fi
LINES_FILE="$OUT/$NAME.jsonl" LOG="$OUT/$NAME.log" KEPT="$BUILD/$NAME.jsonl"
declare -A LIMIT=([build]=150 [smoke]=120 [speed]=220 [all-tests]=500 [tune]=60)
ISAS=native
if [[ $MODE == build ]]; then ISAS=all; fi # for another machine
if [[ $MODE == build ]]; then TOTAL=3600 LIMIT[build]=3600; fi # nothing waits behind it
if [[ $MODE == rehearse ]]; then # no judge of speed: a busy machine has time
  TOTAL="${MAEFAST_CHECK_SECONDS:-1500}"
  LIMIT=([build]=300 [smoke]=400 [speed]=400 [all-tests]=300 [tune]=150)
  export REHEARSE=1
fi
module() { echo "$PYTHON -m maefast.bench.gpu.$1 --lines $LINES_FILE ${TOY[*]-}"; }
declare -A WHAT=(
  [build]="${TARGETS[*]:-nothing} compiled for architecture $ARCH, the rest copied, into $STAGE"
  [smoke]="$(module smoke)" [speed]="$(module speed)" [tune]="$(module tune) --measure --write --data $TABLES"
  [all-tests]="$(module all_tests) --log $LOG"
)
if [[ $MODE == rehearse ]]; then
  WHAT[all-tests]="env TRITON_INTERPRET=1 $PYTHON -m maefast.bench.gpu.all_tests --lines $LINES_FILE --log $LOG --processes 2"
  WHAT[all-tests]+=" --marker not_gpu tests/kernels/test_gelu_kernels.py tests/kernels/test_norm_kernels.py"
fi
say "gpu_check: GPU ${GPU/|/, compute capability }"
"$PYTHON" -c "import sys, torch; print('python', sys.version.split()[0], 'torch', torch.__version__, 'CUDA', torch.version.cuda)"
((${#TARGETS[@]})) && { command -v nvcc >/dev/null && nvcc --version | grep release; cmake --version | head -1; }
((${#optional[@]})) && echo "not installed, done without: ${optional[*]}"
echo "tree ${MAEFAST_COMMIT:-$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null || echo '(commit unknown: set MAEFAST_COMMIT)')}, results to $OUT"
echo "plan, $TOTAL s in all:"
for stage in "${ORDER[@]}"; do
  chosen "$stage" && printf '  %-9s at most %3d s  %s\n' "$stage" "${LIMIT[$stage]}" "${WHAT[$stage]}"
done
if [[ -n $DRY ]]; then
  [[ $MODE == all && $GPU == none:* ]] && echo "without --dry-run this would stop here with status 3: no GPU"
  exit 0
fi
if [[ $MODE == all && $GPU == none:* ]]; then
  echo "gpu_check: no GPU here (${GPU#none: }); nothing was built or run. --build-only compiles without one, --rehearse runs all stages without one." >&2
  exit 3
fi

# --- doing it ----------------------------------------------------------------------------------------------

mkdir -p "$BUILD"
: >>"$LOG"
[[ $MODE == rehearse ]] && rm -f "$KEPT" "$LINES_FILE" "$TABLES" # it begins anew
[[ -n $EARLIER && ! $EARLIER -ef $LINES_FILE ]] && cat "$EARLIER" >>"$LINES_FILE"
[[ -f $LINES_FILE ]] || { [[ -f $KEPT ]] && cp "$KEPT" "$LINES_FILE"; }
[[ -f $LINES_FILE ]] && cp "$LINES_FILE" "$KEPT"
export MAEFAST_CHECK_COPY="$KEPT" MAEFAST_REQUIRE_NATIVE=1 PYTHONPATH="$STAGE" PYTHONUNBUFFERED=1
if [[ -z ${MAEFAST_COMMIT:-} ]] && MAEFAST_COMMIT="$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null)"; then
  MAEFAST_DIRTY=0
  [[ -z $(git -C "$ROOT" status --porcelain -- maefast csrc kernels bench CMakeLists.txt ':!bench/results') ]] || MAEFAST_DIRTY=1
fi
export MAEFAST_COMMIT="${MAEFAST_COMMIT:-}" MAEFAST_DIRTY="${MAEFAST_DIRTY:-}"

# A copy of the tree with the libraries, maefast.kernels and maefast.bench in place: needs no pip and changes no environment.
build() {
  set -e
  rm -rf "$STAGE" && mkdir -p "$STAGE/bench/results"
  if [[ -n $TARGETS ]]; then
    cmake -S "$ROOT" -B "$BUILD/cmake" $GENERATOR -DCMAKE_BUILD_TYPE=Release "-DMAEFAST_CUDA=$CUDA" \
      "-DMAEFAST_CUDA_ARCHS=$ARCH" "-DMAEFAST_ISAS=$ISAS" "-DPython_EXECUTABLE=$(command -v "$PYTHON")"
    cmake --build "$BUILD/cmake" --parallel "${MAEFAST_JOBS:-$(nproc)}" --target $TARGETS
  fi
  (cd "$ROOT" && tar cf - --exclude=__pycache__ --exclude=bench/results --exclude='*.so' maefast pyproject.toml tests bench kernels csrc) |
    tar xf - -C "$STAGE"
  cp -r "$STAGE/kernels" "$STAGE/bench" "$STAGE/maefast/"
  for target in $TARGETS; do cp "$BUILD/cmake/$target"*.so "$STAGE/maefast/"; done
  for name in _C.abi3.so _cpu.so _cuda.so; do
    [[ -f $STAGE/maefast/$name || ! -f $PREBUILT/$name ]] || cp "$PREBUILT/$name" "$STAGE/maefast/"
  done
  cd "$STAGE"
  # An editable install of maefast goes before every path; within the stage it must not.
  cat >sitecustomize.py <<'PY'
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
PY
  "$PYTHON" -m maefast.bench.gpu.staged
}
export BUILD STAGE ROOT PYTHON ARCH PREBUILT ISAS
build_script="$(declare -f build); TARGETS='${TARGETS[*]-}' GENERATOR='${GENERATOR[*]-}' CUDA=on; "
[[ $MODE == rehearse ]] && build_script+="CUDA=off; "

STATUS=0 CHILD="" WARM=""
trap 'kill $CHILD $WARM 2>/dev/null; exit 143' TERM INT
# part STAGE COMMAND...: run under the stage's limit and what is left of the whole; everything it says goes to $LOG.
part() {
  local name=$1 limit=${LIMIT[$1]} left=$((TOTAL - SECONDS)) start=$SECONDS
  shift
  ((left < limit)) && limit=$left
  if ((limit < 10)); then
    echo "== $name: not run, the time is spent"
    return 1
  fi
  say "$name (at most $limit s)" | tee -a "$LOG"
  local before
  before=$(wc -c <"$LOG")
  # In the background, so that a signal to this script reaches it at once.
  timeout -k 5 "$limit" "$@" ${PASS_SECONDS:+--seconds "$((limit - 3))"} >>"$LOG" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  STATUS=$?
  tail -c "+$((before + 1))" "$LOG" | tail -n "${TAIL:-30}"
  echo "== $name: status $STATUS, $((SECONDS - start)) s"
  [[ $STATUS == 0 ]]
}

if chosen build; then
  TAIL=12 part build bash -c "$build_script build"
  if [[ $STATUS != 0 ]]; then
    echo "gpu_check: the build failed; see $LOG" >&2
    exit 1
  fi
  if [[ $MODE == build ]]; then
    echo "gpu_check: the build works; nothing was run"
    exit 0
  fi
elif [[ ! -f $STAGE/sitecustomize.py ]]; then
  echo "gpu_check: nothing is built in $STAGE; begin with the stage build" >&2
  exit 2
fi
cd "$STAGE" || exit 1
if chosen build; then
  "$PYTHON" -m maefast.bench.gpu.staged --lines "$LINES_FILE" >>"$LOG" 2>&1
  "$PYTHON" -m maefast.cli doctor --json >"$OUT/doctor.json" 2>>"$LOG" || echo "maefast doctor failed; see $LOG"
fi
PASS_SECONDS=1
if chosen smoke; then
  if chosen speed && [[ $MODE != rehearse ]]; then # torch.compile of the peers needs cores more than the GPU
    timeout -k 5 150 "$PYTHON" -m maefast.bench.gpu.speed --warm >>"$LOG" 2>&1 &
    WARM=$!
  fi
  # shellcheck disable=SC2086  # the commands are words
  part smoke ${WHAT[smoke]}
fi
if chosen speed; then
  [[ -n $WARM ]] && wait "$WARM"
  # shellcheck disable=SC2086
  part speed ${WHAT[speed]}
fi
# shellcheck disable=SC2086
if chosen all-tests; then part all-tests ${WHAT[all-tests]}; fi
# shellcheck disable=SC2086
if chosen tune; then part tune ${WHAT[tune]}; fi

# --- the verdict, last -------------------------------------------------------------------------------------

say "summary"
"$PYTHON" -m maefast.bench.gpu.summary "$LINES_FILE" --stages "${CHOSEN[@]}" | tee "$OUT/$NAME.txt"
exit "${PIPESTATUS[0]}"
