"""`maefast bench`: finds the benchmarks of a checkout, lists them, runs one."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from maefast.errors import TrainError


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
    """{name: file} of what `python -m bench.NAME` runs: modules with a `main`, and packages with a __main__.py."""
    found = {path.stem: path for path in folder.glob("*.py") if "main" in _functions(path)}
    found.update({path.parent.name: path for path in folder.glob("*/__main__.py")})
    return dict(sorted(found.items()))


def run_benchmark(name: str | None, arguments: list[str], say: Callable[[str], None]) -> int:
    """List what there is (name=None), or run one in its own process. Returns the exit status."""
    folder = bench_folder()
    found = find_benchmarks(folder)
    if name is None:
        say(f"Benchmarks in {folder}; run one with: maefast bench NAME [its options]\n")
        for key, path in found.items():
            say(f"  {key:<12} {_summary(path)}")
        return 0
    if name not in found:
        raise TrainError(f"no benchmark {name!r}; there are: {', '.join(found)}")
    return subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], cwd=folder.parent).returncode


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _functions(path: Path) -> set[str]:
    return {node.name for node in _tree(path).body if isinstance(node, ast.FunctionDef)}


def _summary(path: Path) -> str:
    return (ast.get_docstring(_tree(path)) or "").split("\n")[0]
