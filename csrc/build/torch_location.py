"""Where the installed torch is, without importing it (it may be invisible under build isolation).

Run as a script it prints `directory;version;cuda` ("none" for a CPU-only torch) for CMake.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 10)


class Torch(NamedTuple):
    directory: Path
    version: str
    cuda: str | None

    @property
    def recent_enough(self) -> bool:
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:2]) >= MINIMUM


def search_paths() -> list[str]:
    """Directories that may hold torch, nearest first.

    A build front end hides the target's site-packages from `sys.path`, but it runs the target's interpreter
    (pip) or leaves VIRTUAL_ENV as it was (build, uv), so both still tell where the target is.
    """
    paths = list(sys.path)
    paths += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if venv := os.environ.get("VIRTUAL_ENV"):
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        paths += [str(Path(venv, lib, name, "site-packages")) for lib in ("lib", "lib64")]
    if sys.prefix == sys.base_prefix or _system_site_packages():
        paths += site.getsitepackages([sys.base_prefix])
        if site.ENABLE_USER_SITE is not False:
            paths.append(site.getusersitepackages())
    return list(dict.fromkeys(p for p in paths if p))


def _system_site_packages() -> bool:
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.M | re.I) is not None


def find_torch(paths: list[str] | None = None) -> Torch | None:
    """The first torch with headers and libraries on `paths` (default: `search_paths()`), or None.

    MAEFAST_TORCH_DIR (the directory of the package `torch`) overrides the search.
    """
    if chosen := os.environ.get("MAEFAST_TORCH_DIR"):
        return _read(Path(chosen))
    spec = importlib.machinery.PathFinder.find_spec("torch", paths if paths is not None else search_paths())
    if spec is None or spec.origin is None:
        return None
    return _read(Path(spec.origin).parent)


def _read(directory: Path) -> Torch | None:
    try:
        text = (directory / "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.M)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.M)
    header = directory / "include/torch/csrc/stable/library.h"
    if version is None or not header.exists():
        return None
    return Torch(directory, version.group(1), cuda.group(1) if cuda else None)


def main() -> int:
    torch = find_torch()
    if torch is None:
        print("no torch with headers was found; install torch >= 2.10 first", file=sys.stderr)
        return 1
    if not torch.recent_enough:
        print(f"torch {torch.version} in {torch.directory} is too old; torch >= 2.10 is needed", file=sys.stderr)
        return 1
    print(torch.directory, torch.version, torch.cuda or "none", sep=";")
    return 0


if __name__ == "__main__":
    sys.exit(main())
