"""`maefast bench`: finds the benchmarks of a checkout, lists them, runs one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import TrainError


def bench_folder() -> Path:
    """The `bench` folder beside the package (a checkout, or an editable install of one) or in the working directory."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "__init__.py").is_file() and (root / "maefast" / "__init__.py").is_file():
            return root / "bench"
    raise TrainError(
        "the benchmarks are not part of the installed package: run this in a checkout of maefast "
        "(the folder with bench/ in it), with pip install 'maefast[bench]'"
    )


def find_benchmarks(folder: Path) -> dict[str, Path]:
    """{name: file}: modules that run by themselves (they define `main`), and microbenchmarks as micro/<family>."""
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if "main" in _functions(path)}
    for path in sorted(folder.glob("micro/bench_*.py")):
        found[f"micro/{path.stem.removeprefix('bench_')}"] = path
    return found


def run_benchmark(name: str | None, arguments: list[str], say: Callable[[str], None]) -> int:
    """List what there is (name=None), or run one in its own process. Returns the exit status."""
    folder = bench_folder()
    found = find_benchmarks(folder)
    if name is None:
        say(f"Benchmarks in {folder}; run one with: maefast bench NAME [its options]\n")
        for key, path in found.items():
            say(f"  {key:<18} {_summary(path)}")
        say("  micro              all microbenchmarks (pytest-benchmark)")
        return 0
    if name == "micro" or (name.startswith("micro/") and name in found):
        target = folder / "micro" if name == "micro" else found[name]
        files = sorted(str(path) for path in target.glob("bench_*.py")) if target.is_dir() else [str(target)]
        command = [sys.executable, "-m", "pytest", "--benchmark-only", *files, *arguments]
    elif name in found:
        command = [sys.executable, "-m", f"bench.{name}", *arguments]
    else:
        raise TrainError(f"no benchmark {name!r}; there are: micro, {', '.join(found)}")
    return subprocess.run(command, cwd=folder.parent, env=os.environ).returncode


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _functions(path: Path) -> set[str]:
    return {node.name for node in _tree(path).body if isinstance(node, ast.FunctionDef)}


def _summary(path: Path) -> str:
    return (ast.get_docstring(_tree(path)) or "").split("\n")[0]
