"""Published systems, each as a `maefast.recipe.Recipe` in a module of its own.

    maefast.recipes.list()                                   # what there is
    recipe = maefast.recipes.create("point_mae", size="small")
    loss = recipe(PointBatch(points)).loss

A module here that defines a recipe with a `spec` is found by itself; see docs/adding-a-recipe.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Sequence
from typing import Any

from maefast import models
from maefast.recipe import Recipe, Spec
from maefast.recipes._weights import load_weights, public_weights

__all__ = ["argument_names", "arguments_of", "create", "kind", "list", "load_weights", "public_weights"]

_KINDS: dict[str, type[Recipe]] = {}


def list() -> Sequence[Spec]:
    """All recipes, by name."""
    found = _found()
    return [found[name].spec for name in sorted(found)]


def kind(name: str) -> type[Recipe]:
    """The class of a recipe. ValueError: there is none of this name."""
    found = _found()
    if name not in found:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(sorted(found))}")
    return found[name]


def create(name: str, size: str | None = None, **overrides: Any) -> Recipe:
    """Build a recipe with fresh weights.

    Args:
        name: see `list`.
        size: one of `Spec.sizes`; None: the first.
        overrides: arguments of the recipe's class, in the place of those of the size.

    Raises:
        ValueError: unknown name or size, arguments that do not fit. TypeError: unknown override.
    """
    cls = kind(name)
    arguments = {**arguments_of(cls.spec, size), **overrides}
    known = argument_names(name)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise TypeError(f"the recipe {name!r} takes no {', '.join(unknown)}; its arguments are {', '.join(known)}")
    recipe = cls(**arguments)
    recipe.config = {"name": name, **{key: value for key, value in arguments.items() if _plain(value)}}
    return recipe


def arguments_of(spec: Spec, size: str | None = None) -> dict[str, Any]:
    """What the name of a size stands for. ValueError: there is none of this name."""
    size = next(iter(spec.sizes)) if size is None else size
    if size not in spec.sizes:
        raise ValueError(f"the recipe {spec.name!r} has no size {size!r}; choose from {', '.join(spec.sizes)}")
    return dict(spec.sizes[size])


def argument_names(name: str) -> Sequence[str]:
    """The overrides that ``create(name, ...)`` takes. ValueError: unknown name."""
    known, rest = _parameters(kind(name))
    if rest and "model" not in known:  # the rest is for the class above
        known += [key for key in _parameters(kind(name).__base__)[0] if key not in known]
    elif rest:  # or for the model that it wraps
        model = next(iter(kind(name).spec.sizes.values()))["model"]
        known += [key for key in models.argument_names(model) if key not in known]
    return known


def _parameters(cls: type) -> tuple[Sequence[str], bool]:
    """Names of the arguments of a class, and whether it takes others too."""
    parameters = inspect.signature(cls).parameters
    named = [key for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    return named, len(named) < len(parameters)


def _found() -> dict[str, type[Recipe]]:
    if not _KINDS:
        for entry in pkgutil.iter_modules(__path__):
            module = importlib.import_module(f"{__name__}.{entry.name}")
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == module.__name__ and "spec" in vars(value):
                    _KINDS[value.spec.name] = value
    return _KINDS


def _plain(value: Any) -> bool:
    """Whether it can be written down; a teacher that was given as a module cannot."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
