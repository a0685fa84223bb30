"""From MODULE:NAME or FILE.py:NAME to what that function or class makes; whatever goes wrong is one clear error."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from maefast.errors import ConfigError

RAISED = (Exception, SystemExit)  # the exit status of a user's code must not become that of the check

_NOT_OWN = (Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1])


def load(spec: str) -> Callable[[], Any]:
    """A function or class that can be called without arguments. Modules are looked for in the current folder first, and
    those of a file in the folder of that file.

    Raises:
        ConfigError: there is no such thing, or it wants arguments.
    """
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise ConfigError(f"{spec!r} is not MODULE:NAME or FILE.py:NAME")
    found: Any = _imported(module)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            public = (key for key, value in getattr(found, "__dict__", {}).items() if callable(value) and key[0] != "_")
            there = ", ".join(itertools.islice(public, 12))
            says = f"; there are: {there}" if there else ""
            raise ConfigError(f"{spec}: {getattr(found, '__name__', module)} has no {part!r}{says}") from error
        except RAISED as error:  # of a module that imports its parts when they are asked for
            raise ConfigError(f"{spec} raised {described(error)}") from error
    if isinstance(found, nn.Module):
        raise ConfigError(f"{spec} is one model, and two are compared: name a function that makes it")
    if not callable(found):
        raise ConfigError(f"{spec} is a {type(found).__name__}, not a function or class")
    if missing := required(found):
        raise ConfigError(f"{spec} wants arguments ({', '.join(missing)}): name a function that gives them")
    return found


def call(function: Callable[[], Any], spec: str) -> Any:
    """What the function makes. ConfigError: it raised something."""
    try:
        return function()
    except RAISED as error:
        raise ConfigError(f"{spec} raised {described(error)}") from error


def model(function: Callable[[], Any], spec: str) -> nn.Module:
    """ConfigError: it raised something, or made no model with weights."""
    made = call(function, spec)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{spec} gives a {type(made).__name__}, not a torch.nn.Module")
    if any(t.is_meta for t in itertools.chain(made.parameters(), made.buffers())):
        raise ConfigError(f"{spec} gives a model on the meta device, without weights: nothing can be run")
    return made


def required(function: Callable) -> list[str]:
    """Names of the arguments that a call cannot do without; [] where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    either = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in either]


def described(error: BaseException) -> str:
    """An error in one line, with the place in the user's own code that it came from."""
    text = next(iter(str(error).splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _own(frame.filename)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{text and f': {text}'}{where}"


def _own(file: str) -> bool:
    path = Path(file)
    return not (
        file.startswith("<")  # code that Python makes itself
        or {"site-packages", "dist-packages"} & set(path.parts)
        or any(folder in path.parents for folder in _NOT_OWN)
    )


def _imported(module: str) -> ModuleType:
    path = Path(module).absolute() if module.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ConfigError(f"there is no file {module}")
    folder, name = (os.getcwd(), module) if path is None else (str(path.parent), path.stem)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # a file may be younger than what Python knows of its folder
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"there is no module {module!r}, here or among those that are installed") from error
        raise ConfigError(f"importing {module} raised {described(error)}") from error
    except RAISED as error:
        raise ConfigError(f"importing {module} raised {described(error)}") from error
    if path is not None and (found.__file__ is None or not path.samefile(found.__file__)):
        raise ConfigError(f"{module} has the name of another module, {found.__file__ or name}: give it another")
    return found
