"""`maefast.accelerate(model)`: somebody else's masked model, faster, with the same outputs, parameters and checkpoints.

One file for each family of models, which says how to recognise it by its structure and replaces some of its methods
(`_swap`); transformer blocks of any model are `transformer`. What is replaced is first compared with the model's own
code on a small random input (`_verify`), and runs as long as all that this code reads is as it was then (`_guards`);
what differs, is overridden or unknown stays, and the report says why.

    family file      recognises
    transformer      pre-norm transformer blocks of timm (EVA-02 and relative positions too), MAE, VideoMAE, MAE-ST,
                     JEPA, DeiT, Hugging Face (BEiT, DINOv3, V-JEPA 2 and Swin with their positions)
    mae              MaskedAutoencoderViT of facebookresearch/mae and its forks, AudioMAE's among them
    mae_st           MaskedAutoencoderViT of facebookresearch/mae_st, for videos
    crossmae         MaskedAutoencoderViT of CrossMAE, and blocks with its cross-attention in any model
    hf_vitmae        ViTMAEForPreTraining and ViTMAEModel of transformers 4 and 5
    hf_videomae      VideoMAEForPreTraining and VideoMAEModel of transformers 4 and 5
    videomae         PretrainVisionTransformer of VideoMAE v1 and v2
    jepa             encoders and predictors of I-JEPA and V-JEPA
    timm_vit         VisionTransformer of timm, with PatchDropout and without
    lightly          MaskedVisionTransformerTIMM, its decoder and MAEDecoderTIMM of lightly
    spark            SparK of keyu-tian/SparK and its forks, around any convnet
    fcmae            FCMAE of facebookresearch/ConvNeXt-V2, whose encoder is MinkowskiEngine's
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import nn

from maefast._memory import release_freed
from maefast.integrations import (
    _explain,
    _swap,
    _verify,
    _worth,
    crossmae,
    fcmae,
    hf_videomae,
    hf_vitmae,
    jepa,
    lightly,
    mae,
    mae_st,
    spark,
    timm_vit,
    transformer,
    videomae,
)
from maefast.integrations import _layers as layers
from maefast.integrations._guards import Guards, Runs, in_mode
from maefast.integrations._report import Note, Report
from maefast.integrations._sites import Unguarded
from maefast.integrations._steps import Options, Step

FAMILIES: tuple[ModuleType, ...] = (
    mae_st,  # before mae, whose names it has
    mae,
    crossmae,
    hf_vitmae,
    hf_videomae,
    videomae,
    jepa,
    spark,
    timm_vit,
    lightly,
    fcmae,
)
_REPORT = "_maefast_report"

__all__ = ["FAMILIES", "Note", "Report", "accelerate", "report", "restore"]


def accelerate(
    model: nn.Module,
    *,
    pred: str = "full",
    repair_positions: bool = False,
    verify: bool = True,
    report: bool = False,
) -> nn.Module:
    """Run a masked model on maefast's kernels. The model is changed in place and returned.

    Outputs, random draws, parameters, buffers, hooks and `state_dict` stay as they are; `report` says what is
    replaced. Works before or after `.to()`, DDP, FSDP, `torch.compile` and loading a checkpoint; before FSDP1 is
    better, which leaves nothing to compare with.

    Args:
        model: any module; models are recognised inside wrappers too.
        pred: "full" keeps the model's predictions as they are. "masked" lets models that return predictions of all
            patches (MAE, ViTMAE) predict the masked ones only, [B, masked, K] ordered as in ``ids_restore``: faster,
            same loss and gradients, another shape of `pred`.
        repair_positions: fill frozen position tables that are all zero (a fresh HF ViTMAE has such) with the
            sine-cosine tables of the paper. Without it they raise a warning.
        verify: compare with the model's own code, forward and gradients, before replacing it. Costs a few steps at
            batch 2; False trusts the structure.
        report: print the report on standard output too, as ``maefast accelerate-check`` does: what `maefast.report`
            returns, at any later time.

    Returns:
        The same object. A model with nothing to accelerate is unchanged, with a warning that says why in one sentence.

    Raises:
        TypeError: no nn.Module. ValueError: unknown `pred`.
    """
    _check(model)
    options = Options(pred=pred, repair_positions=bool(repair_positions))
    restore(model)
    found = Report(type(model).__name__)
    errors: list[float] = []
    unchecked: set[str] = set()
    fresh: dict[int, nn.Parameter] = {}  # random weights, made once for all comparisons

    def perform(step: Step, sized: bool) -> None:
        size = {_swap.SIZE: _size(step.module)} if sized else {}
        try:
            _same_arguments(step)
            guards = step.guards()
            _swap.swap(step.module, step.methods, guards, **step.settings, **size)
            texts = dict(step.texts)
            if verify and (reason := _verify.unsuitable(step.module)):
                unchecked.add(reason)
            elif verify:
                error, only = _verify.agreement(step.module, step.probe, fresh)
                errors.append(error)
                texts = _limit(guards.values(), texts, only)
        except (_verify.Mismatch, Unguarded) as reason:
            _swap.unswap(step.module, tuple(step.methods))
            for name in step.methods:
                gain = step.texts.get(name) or step.texts.get("", "")
                found.add(step.path, name, False, _reason(reason), gain=gain, detail=getattr(reason, "detail", ""))
            return
        for name, text in texts.items():
            found.add(step.path, name, True, text, swapped=True)

    try:
        with torch.inference_mode(False), _verify.same_random_state(model):
            _blocks(model, found, errors, unchecked, verify)
            for path, module, family in _recognised(model):
                if family.NAME not in found.families:
                    found.families.append(family.NAME)
                for step in family.steps(module, options, partial(_note, found, path)):
                    perform(step.under(path), getattr(family, "TOKENS", True))
    except BaseException:
        restore(model)  # nothing is half done
        raise
    _conclude(model, found, errors, unchecked, verify)
    if verify:  # the comparisons held some times the model
        fresh.clear()
        release_freed()
    if report:
        found.show()
    return model


def _same_arguments(step: Step) -> None:
    """Raises `Unguarded` where a fork has other arguments in the places of those that the fast method takes."""
    for name, fast in step.methods.items():
        ours, theirs = (_positional(method) for method in (fast, getattr(type(step.module), name)))
        if any(a != b for a, b in zip(ours[1:], theirs[1:])):
            raise Unguarded(f"its arguments are {', '.join(theirs[1:])}, where maefast knows {', '.join(ours[1:])}")


def _positional(method: Callable) -> list[str]:
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(method).parameters.values() if p.kind in places]


def _size(module: nn.Module) -> _worth.Size:
    """What the patch embedding inside makes of images."""
    conv = layers.convolution(module)
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
        return _worth.Size()
    return _worth.Size(conv.in_channels * math.prod(conv.kernel_size), conv.out_channels)


def _reason(why: Exception) -> str:
    return str(why) if isinstance(why, Unguarded) or why.detail else f"not what it looks like: {why}"


def _limit(guards: Iterable[Guards], texts: dict[str, str], only: bool | None) -> dict[str, str]:
    """Lets methods run in one mode only, if `only` says which; the texts that say so."""
    if only is None:
        return texts
    for guard in guards:
        guard.mode = only
    return {name: f"{text}; {in_mode(not only)}, and runs as it was" for name, text in texts.items()}


def _blocks(model: nn.Module, found: Report, errors: list[float], unchecked: set[str], verify: bool) -> None:
    """Every transformer block; blocks of one kind are compared once."""
    answers: dict[tuple, tuple[str | None, bool | None, str]] = {}
    for path, block, layout in list(transformer.find(model)):
        if reason := _swap.overriding(block, "forward") or transformer.unknown(block, layout):
            found.add(path, "", False, reason, gain=_explain.GAIN)
            continue
        settings = transformer.settings(block, layout)
        try:
            guards = transformer.guards(block, layout, settings)
        except Unguarded as reason:
            found.add(path, "", False, str(reason), gain=_explain.GAIN)
            continue
        kind = transformer.kind(block) if verify else ()
        if kind not in answers:
            answers[kind] = _compared(block, layout, errors, unchecked) if verify else (None, None, "")
        differs, only, detail = answers[kind]
        if differs is not None:
            found.add(path, "", False, differs, gain=_explain.GAIN, detail=detail)
            continue
        _swap.swap(block, {"forward": transformer.forward_of(layout)}, {"forward": guards}, **settings)
        texts = _limit([guards], {"": transformer.text(block, layout)}, only)
        found.add(path, "", True, texts[""], swapped=True)


def _compared(
    block: nn.Module, layout: type, errors: list[float], unchecked: set[str]
) -> tuple[str | None, bool | None, str]:
    """(why the fast forward does not serve this kind of block or None, the only mode that it serves, a traceback)."""
    try:
        error, only = transformer.compare(block, layout)
        errors.append(error)
        return None, only, ""
    except _verify.Mismatch as mismatch:
        return _reason(mismatch), None, mismatch.detail
    except transformer.Unsuitable as reason:
        unchecked.add(str(reason))
        return None, None, ""


def _note(found: Report, path: str, name: str, text: str, done: bool = False, gain: str = "") -> None:
    """What a family has to say about a part of its model: why it stays as it is and what that misses, or what was done
    to it."""
    found.add(path, name, done, text, gain=gain)


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleType]]:
    for path, module in list(model.named_modules()):
        if layers.wrapper(module):
            continue  # what it wraps comes next
        for family in FAMILIES:
            if family.recognise(module):
                yield path, module, family
                break


def _conclude(model: nn.Module, found: Report, errors: list[float], unchecked: set[str], verify: bool) -> None:
    model.__dict__[_REPORT] = found
    for module in model.modules():
        runs = _swap.setting(module, _swap.RUNS, {})
        runs.update({name: Runs() for name in runs})  # those of the comparison do not count
    if not found.replaced:
        if not found.notes:
            for path, text in _explain.near(model):
                found.add(path, "", False, text, gain=_explain.GAIN)
        why = found.why()
        if not why:
            why = f"{type(model).__name__} holds no transformer blocks that maefast knows and is none of its families"
            found.checks.append(f"nothing to accelerate here, because {why}")
            found.checks.append(f"the families are {', '.join(family.NAME for family in FAMILIES)}")
        warnings.warn(
            f"maefast.accelerate: nothing to accelerate here, because {why}; maefast.report(model) says more",
            stacklevel=3,
        )
        return
    if errors:
        found.checks.append(
            "compared with the model's own code: outputs, gradients and random draws agree "
            f"(largest relative difference {max(errors):.0e})"
        )
    if not verify:
        found.checks.append("not compared with the model's own code (verify=False)")
    for reason in sorted(unchecked):
        found.checks.append(f"not compared with the model's own code, because {reason}")


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def report(model: nn.Module) -> Report:
    """What `accelerate` replaced in `model`, what it did not, and why, and what has run since; print it.

    Calls under `torch.compile` are not counted.

    Raises:
        TypeError: model is no `torch.nn.Module`.
        ValueError: the model was never accelerated (or was restored).
    """
    _check(model)
    for module in model.modules():
        if _REPORT in vars(module):
            return vars(module)[_REPORT].now(module)
    raise ValueError("this model is not accelerated: call maefast.accelerate(model) first")


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module of `model` gets its own class and methods back. Returns the same object; a
    model that was not accelerated is left as it is."""
    _check(model)
    for module in model.modules():
        _swap.unswap(module)
        module.__dict__.pop(_REPORT, None)
    return model
