"""Whether somebody watches a module: what stands for several modules at once must then let them run one by one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody watches one of the modules, wraps it, or gave it another forward: then it is called as it is.
    FSDP does, to have the parameters there in time."""
    return watched_everywhere() or any(touched(module) for module in modules)


def touched(m: nn.Module) -> bool:
    """`hooked` for one module, without hooks on every module of the process."""
    own = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(own) or "forward" in m.__dict__ or wrapper(m)


def watched_everywhere() -> bool:
    """Hooks on every module of the process."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def watched(*roots: nn.Module) -> bool:
    """`hooked`, for everything inside: whether something would see what a module is given or returns."""
    return watched_everywhere() or any(touched(module) for root in roots for module in root.modules())


def wrapper(module: nn.Module) -> bool:
    """Whether a module answers for another one inside it, as those of FSDP1, torch.compile and checkpointing do."""
    return type(module).__getattr__ is not nn.Module.__getattr__


def plain_tensor(t: Tensor) -> bool:
    """Not a subclass: those are quantised, sharded or otherwise not what the kernels take."""
    return type(t) is nn.Parameter or type(t) is Tensor
