#!/usr/bin/env bash
# sdist and wheel for others (docs/releasing.md): every instruction set, and with nvcc every CUDA architecture
# (MAEFAST_CUDA=off leaves those out). One wheel serves every Python from 3.10 and every torch from 2.10 on.
#
#     csrc/build/wheels.sh [OUT]       # OUT: dist/; PYTHON: an interpreter with torch, build and auditwheel
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${1:-dist}"
made="$(mktemp -d)"
trap 'rm -rf "$made"' EXIT

export MAEFAST_REQUIRE_NATIVE=1 MAEFAST_ISAS="${MAEFAST_ISAS:-all}" MAEFAST_CUDA_ARCHS="${MAEFAST_CUDA_ARCHS:-all}"
if [ -z "${MAEFAST_CUDA:-}" ]; then
  if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then MAEFAST_CUDA=on; else MAEFAST_CUDA=off; fi
fi
export MAEFAST_CUDA
# The build's environment is isolated; this is the torch whose headers are used.
MAEFAST_TORCH_DIR="${MAEFAST_TORCH_DIR:-$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')}"
export MAEFAST_TORCH_DIR
echo "wheels: instruction sets $MAEFAST_ISAS, CUDA $MAEFAST_CUDA for $MAEFAST_CUDA_ARCHS, torch of $MAEFAST_TORCH_DIR"

"$PYTHON" -m build --outdir "$made" .   # the wheel is built from the sdist, so the sdist is complete
mkdir -p "$OUT"
cp "$made"/*.tar.gz "$OUT"
# torch brings its own libraries; what else the wheel needs must be in every Linux of the tag that auditwheel finds.
"$PYTHON" -m auditwheel repair --wheel-dir "$OUT" --exclude 'libtorch*.so' --exclude 'libc10*.so' "$made"/*.whl
ls -l "$OUT"
