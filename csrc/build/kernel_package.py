"""Lays the fused ops out as a kernel of Hugging Face's `kernels` (docs/releasing.md).

    python csrc/build/kernel_package.py OUT            # OUT/build/<variant>/, which get_local_kernel(OUT) loads
    MAEFAST_CUDA=on python csrc/build/kernel_package.py OUT

A variant is `maefast.ops`, `maefast.masking` and `maefast.kernels` (Triton) with absolute imports made relative, since
`kernels` gives each module a name of its own, and the libraries compiled with a torch.ops namespace of that name, so
that several versions live in one process. By the stable ABIs of torch and Python one variant serves all of theirs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = 0  # of the kernel, as the Hub counts; 0 promises nothing yet
MODULES = ("maefast/_native.py", "maefast/ops", "maefast/masking", "maefast/graphs", "kernels")
LIBRARIES = ("_C.abi3.so", "_cpu.so", "_cuda.so")

INIT = '''"""maefast's fused ops for masked autoencoders: `ops` holds the ops, `masking` the samplers of plans."""

from . import masking, ops
from .ops import *
from .ops import __all__ as _ops

__all__ = ["masking", "ops", *_ops]
'''
# Older versions of `kernels` import the folder of the kernel's name instead.
COMPATIBLE = """import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parents[1] / "__init__.py"
if {id!r} not in sys.modules:
    _spec = importlib.util.spec_from_file_location({id!r}, _path)
    sys.modules[{id!r}] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[{id!r}])
__all__ = sys.modules[{id!r}].__all__
globals().update({{name: getattr(sys.modules[{id!r}], name) for name in __all__}})
"""


def write(out: Path, name: str, libraries: Path, backend: dict) -> Path:
    """Write one variant into `out / "build"`.

    Args:
        name: the kernel's id, a Python name: module and torch.ops namespace, the one that `libraries` were built for.
        libraries: folder with `LIBRARIES` (`_cuda.so` for CUDA alone).
        backend: {"type": "cpu"}, or {"type": "cuda", "version": "13.0", "archs": ["8.0", ...]}.

    Returns:
        The variant's folder, which is made anew.
    """
    cuda = backend["type"] == "cuda"
    tag = "cu" + "".join(backend["version"].split(".")[:2]) if cuda else "cpu"
    target = out / "build" / f"torch-stable-abi210-{tag}-{platform.machine()}-linux"
    shutil.rmtree(target, ignore_errors=True)
    for module in MODULES:
        _copy(ROOT / module, target / module.removeprefix("maefast/"), target)
    registry = target / "ops/_registry.py"
    text, count = re.subn(r'^NAMESPACE = "maefast"', f'NAMESPACE = "{name}"', registry.read_text(), flags=re.M)
    if count != 1:
        raise RuntimeError(f"{registry}: no line that names the namespace")
    registry.write_text(text)
    (target / "__init__.py").write_text(INIT)
    (target / "maefast").mkdir()
    (target / "maefast/__init__.py").write_text(COMPATIBLE.format(id=name))
    for library in LIBRARIES if cuda else LIBRARIES[:2]:
        shutil.copy(libraries / library, target / library)
    shutil.copy(ROOT / "LICENSE", target / "LICENSE")
    files = sorted(path for path in target.rglob("*") if path.is_file())
    metadata = {
        "name": "maefast",
        "id": name,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {key: value for key, value in backend.items() if key != "version"},
        "digest": {"algorithm": "sha256", "files": {str(f.relative_to(target)): _digest(f) for f in files}},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def relative(text: str, depth: int) -> str:
    """`text`, a module in a folder `depth` below the package, with its imports of maefast made relative."""
    text = re.sub(
        r"^(\s*)from maefast(?:\.([\w.]+))? import ", rf"\1from {'.' * (depth + 1)}\2 import ", text, flags=re.M
    )
    if left := re.search(r"^\s*((?:import|from) maefast\b.*)$", text, re.M):
        raise ValueError(f"an import that cannot be made relative: {left.group(1)}")
    return text


def _copy(source: Path, target: Path, package: Path) -> None:
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_dir() or path.suffix in (".py", ".json"):
                _copy(path, target / path.name, package)
    elif source.parent.name != "__pycache__":
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        depth = len(target.relative_to(package).parts) - 1
        target.write_text(relative(text, depth) if source.suffix == ".py" else text)


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=7", "HEAD") + ("_dirty" if git("status", "--porcelain", "-uno") else "")


def _archs(cmake: list[str]) -> list[str]:
    """["8.0", "9.0a", "10.0+PTX"] of ["80-real", "90a-real", "100-real", "100-virtual"]."""
    named: dict[str, str] = {}
    for arch in cmake:
        number, _, kind = arch.partition("-")
        dotted = re.sub(r"^(\d+)(\d)", r"\1.\2", number)
        named[dotted] = dotted + ("" if kind == "real" else "+PTX")
    return list(named.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    build = ROOT / "build/kernel"
    name = f"_maefast_{_commit()}"
    settings = {"MAEFAST_NAMESPACE": name, "MAEFAST_ISAS": "all", "MAEFAST_CUDA_ARCHS": "all"}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-D{key}={value}" for key, value in settings.items()]
    options += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options], check=True)
    subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
    sys.path.insert(0, str(build))
    info = importlib.import_module("_C").build_info()
    backend = {"type": "cpu"}
    if info["cuda_archs"]:
        backend = {"type": "cuda", "version": info["cuda"], "archs": _archs(info["cuda_archs"].split())}
    print(write(out, name, build, backend))


if __name__ == "__main__":
    main()
