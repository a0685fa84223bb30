"""Finding a model's weights in what a file holds: below which keys, and behind which names of wrappers.

    {"epoch": 3, "state_dict": {"model._orig_mod.module.blocks.0.norm1.weight": …}}    ->   "blocks.0.norm1.weight"

Training loops put weights below "model", "state_dict", "model_state_dict", … and beside an optimizer; DDP, FSDP,
torch.compile, Lightning and averaging put words before the names. The names of the models that are known tell which
part of a file is meant; where it holds two of them, the one that is no average is taken, or the average on request.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maefast.models.convert import is_hf
from maefast.models.convnames import FCMAE, SPARK, family, is_sparse, is_timm_convnext

# Words that wrappers put anywhere into a name: DDP and AveragedModel, torch.compile, FSDP, activation checkpointing.
_WORD = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_WORDS, _FIRST_WORD = re.compile(rf"(?:^|(?<=\.)){_WORD}"), re.compile(_WORD)
_COUNTERS = ("n_averaged", "num_updates", "initted", "step", "decay")  # of averages, beside the weights
# Keys and prefixes of averages: model_ema, EMA, modelEma, teacher, swa_model, averaged_model, backbone_momentum.
_AVERAGED = re.compile(
    r"(?:^|[._])(?:ema|swa|teacher|averaged?|shadow|target|momentum_(?:encoder|model))(?=$|[._]|model)"
    r"|(?<=_)momentum(?=$|[._])",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# A layer that each known model has once: what stands before it is a wrapper's.
_ANCHORS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "downsample_layers.0.0.weight",
    "stem.0.weight",
    "conv1.weight",
)
_INNER = ("vit.", SPARK, FCMAE)  # of the models themselves, before those layers
_USUAL = ("model", "state_dict", "model_state_dict", "module")  # where weights are, in this order, if a file has more
_NOT_WEIGHTS = re.compile(
    r"(?:^|_)(?:optim|optimizers?|optimizer_states?|(?:lr_)?schedulers?|scaler|loops|hyper_parameters)(?:$|_)|^args$"
)
_LIGHTNING_CURRENT = "current_model_state"  # beside it, Lightning's WeightAveraging puts the average at "state_dict"
_DEPTH = 5


@dataclass
class Found:
    """A state dict in a file. `path`: keys it is below. `prefix`: what was taken from its names. `averaged`: whether it
    is a running average (EMA, teacher) of trained weights. `others`: places of other models, that were left."""

    state: dict[str, Tensor]
    path: tuple[str, ...]
    prefix: str
    averaged: bool
    others: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it was, for messages."""
        below = "/".join(f'"{word}"' for word in self.path)
        text = " ".join(part for part in (below, f"names behind {self.prefix!r}" if self.prefix else "") if part)
        return f"{text} (there are also {', '.join(self.others)})" if self.others else text


class Ambiguous(ValueError):
    """Several models in one file, and nothing says which."""


def find_state(
    content: Any, ema: bool = False, names: Collection[str] = (), unused: tuple[str, ...] = ()
) -> Found | None:
    """The weights of a known model in `content` (what torch.load gives), or None if there are none.

    Args:
        ema: take the averaged copy (EMA, teacher) instead of the trained weights.
        names: of the model that they are for: a state dict with just these is taken as it is, whatever they are.
        unused: beginnings of names that may stand beside these, and are left out.

    Raises:
        Ambiguous: several models, or no averaged copy although `ema`.
    """
    mappings = list(_mappings(content))
    models = [found for path, state in mappings for found in _exactly(state, path, frozenset(names), unused)]
    models = models or [found for path, state in mappings for found in _models(state, path)]
    if isinstance(content, Mapping) and _LIGHTNING_CURRENT in content:
        for found in models:
            found.averaged |= found.path == ("state_dict",)
    return _choose(models, ema)


def only_state(content: Any, ema: bool = False) -> Found | None:
    """The state dict in `content`, of a network of any kind; None if there is none, or nothing says which.

    Raises:
        Ambiguous: no averaged copy although `ema`.
    """
    models = []
    for path, state in _mappings(content):
        while all(_FIRST_WORD.match(key) for key in state):
            state = {_FIRST_WORD.sub("", key, count=1): value for key, value in state.items()}
        models.append(Found(state, path, "", _is_average(*path)))
    try:
        return _choose(models, ema)
    except Ambiguous:
        if ema:
            raise
        return None


def _choose(models: list[Found], ema: bool) -> Found | None:
    if not models:
        return None
    chosen = [found for found in models if found.averaged is ema]
    if ema and not chosen:
        raise Ambiguous(f"no averaged copy (EMA) in it; found {_places(models)}")
    chosen = _without_copies(chosen or models)
    usual = sorted(
        (found for found in chosen if not found.path or found.path[-1] in _USUAL),
        key=lambda found: _USUAL.index(found.path[-1]) if found.path else len(_USUAL),
    )
    if len(chosen) == 1:
        return chosen[0]
    if not usual or (len(usual) > 1 and usual[0].path == usual[1].path):
        raise Ambiguous(f"it holds {len(chosen)} models: {_places(chosen)}; save the one that is meant alone")
    usual[0].others = tuple(found.place for found in chosen if found is not usual[0])
    return usual[0]


def _places(models: list[Found]) -> str:
    return ", ".join(found.place or "names at the top" for found in models)


def _without_copies(models: list[Found]) -> list[Found]:
    """One of those that are the same tensors, as in files that keep weights below two keys."""
    out: list[Found] = []
    for found in models:
        if not any(_same(found.state, other.state) for other in out):
            out.append(found)
    return out


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and bool((a[key] == b[key]).all()) for key in a)


def _is_average(*words: str) -> bool:
    return any(_AVERAGED.search(_CAMEL.sub("_", word.rstrip("."))) for word in words)


def _mappings(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary of names and tensors in `content`; records beside the tensors are left out."""
    if len(path) > _DEPTH:
        return
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content)) if len(content) < 100 else {}
    if not isinstance(content, Mapping):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if not (isinstance(key, str) and _NOT_WEIGHTS.search(key)):
            yield from _mappings(value, (*path, str(key)))


def _exactly(
    state: Mapping[str, Tensor], path: tuple[str, ...], names: frozenset[str], unused: tuple[str, ...]
) -> Iterator[Found]:
    kept = {key: value for key, value in state.items() if not (unused and key.startswith(unused))}
    if names and names == kept.keys():
        yield Found(kept, path, "", _is_average(*path))


def _models(state: Mapping[str, Tensor], path: tuple[str, ...]) -> Iterator[Found]:
    """The known models among the names of one state dict."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        short = _WORDS.sub("", key)
        if short in plain:  # two models, told apart by a wrapper's word alone
            return
        plain[short] = value
    prefixes: list[str] = []
    for prefix in sorted({p for key in plain for p in _prefixes(key)}, key=len):
        part = any(prefix == outer + inner for outer in prefixes for inner in _INNER)
        if not part and known({key.removeprefix(prefix) for key in plain if key.startswith(prefix)}):
            prefixes.append(prefix)
    counted = "n_averaged" in plain  # torch's AveragedModel
    for prefix in prefixes:
        deeper = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        inside = {
            key.removeprefix(prefix): value
            for key, value in plain.items()
            if key.startswith(prefix) and not (deeper and key.startswith(deeper)) and key not in _COUNTERS
        }
        yield Found(inside, path, prefix, counted or _is_average(*path, prefix))


def _prefixes(key: str) -> Iterator[str]:
    for anchor in _ANCHORS:
        if key.endswith(anchor):
            before = key[: -len(anchor)]
            if not before or before.endswith("."):
                yield before
                for inner in _INNER:
                    if before.endswith(inner):
                        yield before[: -len(inner)]
    if SPARK in key:  # around any encoder
        yield key[: key.index(SPARK)]


def known(names: Iterable[str]) -> bool:
    """Whether these are the names of a model, or an encoder, that maefast knows, in any library's spelling."""
    state = dict.fromkeys(names)
    return family(state) is not None or is_sparse(state) or is_timm_convnext(state) or is_hf(state)
