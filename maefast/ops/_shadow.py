"""16-bit copies of weights, which an optimizer writes in the pass that updates them: `shadow_of`.

Under autocast every layer casts its weight in every step. An optimizer that has the new weight in its registers writes
the copy for a quarter of that traffic; the layers ask `shadow_of` for it and cast where there is none.

A copy is in use only while nothing else has written to the weight. Whatever autograd counts (`_version`) is seen:
in-place operations, `load_state_dict`, writes through views and `detach()`. What it does not count is `.data`, which
averages of weights are often copied back through, and torch's fused optimizers; so from the first copy on
`Parameter.data` and the steps of all optimizers are watched. Not seen are writes through NumPy, DLPack, storages and
addresses, by other processes and collectives, and `.data` of a detached alias; after those call
`maefast.optim.AdamW.refresh_shadows`.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

SHADOW_DTYPES = (torch.bfloat16, torch.float16)


class Shadow:
    """The copy of one parameter. Its optimizer owns both and calls `record` when it has written them."""

    __slots__ = ("__weakref__", "aliased", "copy", "param", "pointer", "shape", "strides", "version")

    def __init__(self, param: nn.Parameter, dtype: torch.dtype) -> None:
        _watch()
        self.param = param  # not weak: torch.utils.swap_tensors refuses a tensor with weak references
        self.copy = torch.empty_like(param, dtype=dtype, requires_grad=False)
        self.shape, self.strides = self.copy.shape, self.copy.stride()
        self.version = self.pointer = -1
        self.aliased = True  # a tensor that shares the parameter's memory but not its version may exist
        _SHADOWS[id(param)] = self

    def fits(self, param: Tensor) -> bool:
        """Whether the copy has the parameter's place, shape and order in memory."""
        return self.shape == param.shape and self.strides == param.stride() and self.copy.device == param.device

    def record(self, param: Tensor) -> None:
        """Parameter and copy hold the same numbers now."""
        if self.aliased and _is_aliased(param):
            self.version = -1
            return
        self.aliased = False
        self.version, self.pointer = param._version, param.data_ptr()

    def is_valid(self) -> bool:
        param = self.param
        return (
            self.version == param._version
            and self.pointer == param.data_ptr()
            and self.strides == param.stride()
            and self.shape == param.shape
        )


_SHADOWS: weakref.WeakValueDictionary[int, Shadow] = weakref.WeakValueDictionary()  # by the parameter's id
_in_graph = False


def shadow_of(param: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy of `param` in `dtype` (torch.bfloat16 or torch.float16) if its optimizer keeps one and it holds
    ``param.to(dtype)`` now, else None.

    The optimizer writes to it in its next step, so it must not be kept beyond the backward, nor written to. None also
    under torch.compile, and while a CUDA graph is captured outside `shadows_in_graph`.
    """
    if not _SHADOWS or torch.compiler.is_compiling():
        return None
    shadow = _SHADOWS.get(id(param))
    if shadow is None or shadow.copy.dtype is not dtype or shadow.param is not param or not shadow.is_valid():
        return None
    if param.is_cuda and not _in_graph and torch.cuda.is_current_stream_capturing():
        return None
    return shadow.copy


@contextmanager
def shadows_in_graph():
    """Lets a CUDA graph that is captured inside read copies. A replay asks nobody whether they are valid, so whoever
    replays it must call `maefast.optim.AdamW.refresh_shadows` before each replay; the graph must hold the step too."""
    global _in_graph
    before, _in_graph = _in_graph, True
    try:
        yield
    finally:
        _in_graph = before


# --- what autograd does not count --------------------------------------------------------------------------

_DATA = torch._C.TensorBase.data


def _touched(param: Tensor) -> None:
    shadow = _SHADOWS.get(id(param))
    if shadow is not None:
        shadow.version, shadow.aliased = -1, True


def _get_data(param: nn.Parameter) -> Tensor:
    _touched(param)
    return _DATA.__get__(param)


def _set_data(param: nn.Parameter, value: Tensor) -> None:
    _touched(param)
    _DATA.__set__(param, value)


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not getattr(optimizer, "_counts_writes", False):
        for group in optimizer.param_groups:
            for param in group["params"]:
                shadow = _SHADOWS.get(id(param))
                if shadow is not None:
                    shadow.version = -1


def _watch() -> None:
    """`Parameter.data` as it is, but a copy ends when it is read or set: what it returns can be written to unseen. And
    a copy ends when an optimizer that may not count its writes has made a step."""
    if "data" not in vars(nn.Parameter):
        nn.Parameter.data = property(_get_data, _set_data, doc=_DATA.__doc__)
        register_optimizer_step_post_hook(_after_step)


def _holders(tensor: Tensor) -> int:
    """How many tensors share this one's memory, plus a constant; very many where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 2**31 if count is None else count(tensor.untyped_storage()._cdata)


_ALONE = _holders(torch.empty(1))


def _is_aliased(param: Tensor) -> bool:
    return not 0 < _holders(param) <= _ALONE < 2**31
