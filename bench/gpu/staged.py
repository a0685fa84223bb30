"""Whether the staged tree is complete: its own maefast, with the libraries. With --lines, the result becomes a line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import maefast
import maefast.kernels
import maefast.ops  # loads the libraries
from maefast import _native
from maefast.bench.environment import ROOT
from maefast.bench.gpu import lines


def problem() -> str | None:
    """What is wrong with the tree, or None."""
    if Path(maefast.__file__).parent != ROOT / "maefast":
        return f"another maefast is in the way: {maefast.__file__}"
    status = _native.status()
    if not (status["C"] and status["cpu"]):
        return status["error"]
    if os.environ.get("REHEARSE"):
        return None
    if not Path(ROOT, "maefast", "_cuda.so").exists():
        return "the CUDA library was not built"
    return None if status["cuda"] or torch.version.cuda is None else status["cuda_note"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.staged", description=__doc__)
    parser.add_argument("--lines", type=Path)
    args = parser.parse_args(argv)
    wrong = problem()
    print("libraries:", {**_native.status(), "paths": None}, wrong or "fine")
    if args.lines:
        outcome = {"outcome": "failed", "error": wrong} if wrong else {"outcome": "passed"}
        lines.Lines(args.lines, "build").write("libraries", **outcome)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
