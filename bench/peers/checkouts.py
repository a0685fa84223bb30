"""Model code of public checkouts, imported from where the user put them. Nothing of theirs is kept here.

Much of it is written for old libraries, and imports data loading and logging that a model does not need. What is
missing of those gets an empty stand-in; what old timm, torch and numpy offered gets its name back.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import types
from pathlib import Path

from torch import nn

# Imported by public model code, used by none of it for the model itself.
UNUSED = ("torchvision", "pytz", "cv2", "decord", "tensorboard", "tensorboardX")


def use(paths: list[str]) -> None:
    """Put the checkouts in front of the installed packages.

    Raises:
        FileNotFoundError: one is not a folder.
    """
    for path in reversed([Path(path).resolve() for path in paths]):
        if not path.is_dir():
            raise FileNotFoundError(f"no checkout at {path}")
        if str(path) not in sys.path:
            sys.path.insert(1, str(path))  # behind the folder of this repository
    missing = tuple(name for name in UNUSED if not _imports(name))
    if missing:
        sys.meta_path.append(_StandIns(missing))
    if not _imports("torch._six"):  # of torch until 1.12: where AudioMAE's helpers look for inf
        sys.modules["torch._six"] = types.ModuleType("torch._six")
        sys.modules["torch._six"].inf = math.inf
    import numpy as np

    if not hasattr(np, "float"):
        setattr(np, "float", float)  # noqa: B010  as an attribute, linters take it for the type


def old_timm() -> None:
    """What code written for timm 0.3 to 0.5 asks of it: a Block that takes `qk_scale` (the MAE code passes None), and
    submodules of `timm.models.layers`."""
    import timm.layers.drop
    from timm.models import layers
    from timm.models import vision_transformer as vit

    layers.drop = timm.layers.drop
    if isinstance(vit.Block, type) and "qk_scale" not in inspect.signature(vit.Block).parameters:
        new = vit.Block
        vit.Block = lambda *args, qk_scale=None, **more: new(*args, **more)


def origin(model: nn.Module, paths: list[str]) -> str:
    """The checkout and the file that hold the class of `model`.

    Raises:
        ImportError: it comes from elsewhere.
    """
    file = Path(inspect.getfile(type(model))).resolve()
    for path in map(Path, paths):
        if file.is_relative_to(path.resolve()):
            name = path.name if "+" in path.name else "/".join(path.resolve().parts[-2:])
            return f"{name.replace('+', '/')}: {file.relative_to(path.resolve())}"
    raise ImportError(f"{type(model).__name__} comes from {file}, which is in none of the checkouts")


def _imports(name: str) -> bool:
    try:
        return bool(importlib.import_module(name))
    except Exception:  # torchvision beside a torch that it was not built for raises others
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[module]
        return False


class _Names(type):
    """So that attributes of a stand-in's attributes exist, too."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __version__ = "99.0"
    __path__: list[str] = []  # noqa: RUF012  of a package

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Names(name, (), {"__init__": lambda self, *args, **more: None})
        setattr(self, name, value)
        return value


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module) -> None:
        pass
