"""`graphed_step`: a training step that is captured once and replayed as one launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maefast.graphs import capture, checks
from maefast.graphs.capture import GraphCaptureError
from maefast.graphs.inputs import Arguments
from maefast.graphs.optimizer import CapturedOptimizer, changed
from maefast.graphs.state import static


def graphed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[..., Tensor] | None = None,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    accumulate: int = 1,
    warmup: int = 3,
) -> GraphedStep:
    """A training step, ``step(*inputs, **keywords) -> loss``, that is one CUDA graph after the first few calls.

    Each call does what this loop does, with the same results and the same random numbers:

        optimizer.zero_grad()
        with torch.autocast(device, autocast):
            loss = model(*inputs, **keywords)           # or its first output, or its .loss
        loss.backward()
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    The first `warmup` calls run it just so; they are real steps. The next one captures it, and from then on a call
    copies its inputs into fixed buffers and replays, so that Python costs next to nothing. On a CPU every call is the
    loop, bit for bit.

    The graph holds what was there when it was captured: shapes, dtypes, numbers among the arguments, the optimiser's
    settings, which parameters are trained; each call checks that they still are. Only the learning rate may change:
    set ``group["lr"]`` or use torch's schedules; on CUDA it is a float32 tensor from then on. Python code of the model,
    hooks included, runs while capturing and not again.

    Args:
        model: on one device, in one process. loss: called instead of the model; returns a scalar.
        optimizer: on CUDA one that has `capturable` (torch.optim.AdamW, best with fused=True), or fused SGD.
            `capturable` is switched on here.
        clip: largest norm of the gradient of all parameters.
        autocast: torch.bfloat16, or None for none. float16 would need a GradScaler, which a graph does not hold.
        generator: what masks are drawn from instead of the device's default generator: handed on to the model as
            ``generator=`` (maefast's models take it); `loss` draws from it itself.
        accumulate: micro-batches in a step. Above 1 a call takes so many: each a tensor, a tuple of inputs or a dict of
            keywords. Gradients and losses are averaged.
        warmup: calls before the capture, at least 1: kernels are compiled and the optimiser's state is made in them.

    Returns:
        GraphedStep: a callable that returns the loss of the call, detached; `grad_norm` is what clipping found.

    Raises:
        TypeError, ValueError: arguments that do not fit; float16; DistributedDataParallel, several processes, hooks
            that run when a gradient or an update is done; in a call: other shapes, dtypes or devices than in the first.
        GraphCaptureError: the step waits for the device, or reads from it. Nothing of that call has run.
    """
    return GraphedStep(model, optimizer, loss, clip, autocast, generator, accumulate, warmup)


class GraphedStep:
    """See `graphed_step`.

    Attributes:
        captured: whether calls replay a graph by now.
        grad_norm: of the last call before clipping, a tensor; None without `clip`.
    """

    def __init__(self, model, optimizer, loss, clip, autocast, generator, accumulate, warmup) -> None:
        self.device = checks.settings(model, optimizer, loss, clip, autocast, generator, accumulate, warmup)
        self.model, self.optimizer = model, optimizer
        self._loss = model if loss is None else loss
        self._keywords = {} if generator is None or loss is not None else {"generator": generator}
        self._clip, self._autocast, self._accumulate, self._warmup = clip, autocast, accumulate, warmup
        self._recorder = capture.recorder(self.device, generator)
        self._modules = list(model.modules())
        self.captured, self.grad_norm = False, None
        self._first: Arguments | None = None
        self._buffers: list[Tensor] = []
        self._forget_graph()
        if self._recorder is not None:
            self._captured_optimizer = CapturedOptimizer(optimizer, self.device)
            self._hook = optimizer.register_load_state_dict_post_hook(_forgetting(self))

    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("call a graphed step outside of torch.autocast, and give graphed_step(autocast=...)")
        given = Arguments(self._batches(inputs, keywords))
        devices = (self.device,) if self._recorder is None else (self.device, torch.device("cpu"))
        if self._first is None:
            given.must_lie_on(devices)
        else:
            given.must_match(self._first, devices)
        if self._recorder is None:
            with static():
                loss, self.grad_norm = self._step(given.filled(given.tensors))
            self._first = self._first or given.shapes()
            return loss
        new = self._first is None
        self._fill(given)
        try:
            return self._on_device()
        except BaseException:
            if new:  # inputs that the model itself refuses shall not stay the right ones
                self.reset()
            raise

    def reset(self) -> None:
        """Forget the graph and the shapes: the next calls are as the first ones were."""
        self._first, self._buffers = None, []
        self._forget_graph()

    def release(self) -> None:
        """Drop the graph and its memory; the optimiser's learning rates become numbers again. Waits for the device."""
        self.reset()
        if self._recorder is not None:
            self._captured_optimizer.release()

    # --- the step -------------------------------------------------------------------------------------------

    def _step(self, batches: list[tuple[tuple, dict]]) -> tuple[Tensor, Tensor | None]:
        """(loss, norm of the gradient): what a hand-written loop does."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        total = None
        for args, keywords in batches:
            with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                loss = scalar(self._loss(*args, **self._keywords, **keywords))
            (loss if self._accumulate == 1 else loss / self._accumulate).backward()
            total = loss.detach() if total is None else total + loss.detach()
        norm = None
        if self._clip is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        return (total if self._accumulate == 1 else total / self._accumulate), norm

    def _on_device(self) -> Tensor:
        """One step on the buffers: as it is, captured, or replayed."""
        self._captured_optimizer.prepare()
        if not self.captured:
            self._captured_optimizer.make_capturable()
            if self._done < self._warmup:
                with static():
                    loss, norm = self._recorder.run(self._on_buffers)
                self._done += 1
                return self._result(loss, norm)
            self._capture()
        elif what := self._changed():
            raise ValueError(f"{what}: a graph keeps what was there when it was captured. Call reset() to capture anew")
        self._recorder.replay()
        return self._result(*self._outputs)

    def _on_buffers(self) -> tuple[Tensor, Tensor | None]:
        return self._step(self._first.filled(self._buffers))

    def _capture(self) -> None:
        checks.hooks(self.model, self.optimizer)
        # Gradients made while capturing lie in the graph's own memory.
        self._drop_gradients()
        try:
            with static():
                self._outputs = self._recorder.record(self._on_buffers)
        except Exception as error:
            self._drop_gradients()
            raise GraphCaptureError(capture.explain(error)) from error
        self._held = self._constants()
        self.captured = True

    def _result(self, loss: Tensor, norm: Tensor | None) -> Tensor:
        """Copies, because the next replay writes into the originals."""
        self.grad_norm = None if norm is None else norm.clone()
        return loss.clone()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    # --- arguments ------------------------------------------------------------------------------------------

    def _batches(self, inputs: tuple, keywords: dict) -> list[tuple[tuple, dict]]:
        if self._accumulate == 1:
            return [(inputs, keywords)]
        if keywords or len(inputs) != self._accumulate:
            more = " and keywords" if keywords else ""
            raise ValueError(
                f"a step that accumulates takes its {self._accumulate} micro-batches, each a tensor, a tuple of inputs"
                f" or a dict of keywords; got {len(inputs)} inputs{more}"
            )
        return [
            ((), batch) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
            for batch in inputs
        ]

    def _fill(self, given: Arguments) -> None:
        """Copy the inputs into the buffers, without waiting; those of the first call are made here."""
        if self._first is None:
            self._buffers = [torch.empty_like(tensor, device=self.device) for tensor in given.tensors]
            self._first = given.shapes()
        for buffer, tensor in zip(self._buffers, given.tensors):
            buffer.copy_(tensor, non_blocking=True)

    # --- what a graph holds ---------------------------------------------------------------------------------

    def _forget_graph(self) -> None:
        self.captured, self._done, self._outputs, self._held = False, 0, None, None
        if self._recorder is not None:
            self._recorder.forget()

    def _constants(self) -> tuple:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return (
            self._captured_optimizer.constants(),
            [module.training for module in self._modules],
            [parameter.requires_grad for parameter in parameters],
            [parameter.data_ptr() for parameter in parameters],
        )

    def _changed(self) -> str | None:
        """What is not as it was when the step was captured, in words."""
        settings, modes, trained, places = self._constants()
        if settings != self._held[0] and (what := changed(self._held[0], settings)):
            return f"the optimiser was changed: {what}"
        if modes != self._held[1]:
            return "the model was put into another mode by train() or eval()"
        if trained != self._held[2]:
            return "requires_grad of some parameters was changed"
        if places != self._held[3]:
            return "some parameters were replaced or moved"
        return None


def scalar(output: Any) -> Tensor:
    """The loss in what a model returns: itself, its "loss", or the first of several."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif not isinstance(output, Tensor) and hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        what = f"shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"the model must return its loss, a scalar, alone or first or as .loss; got {what}")
    return found


def _forgetting(step: GraphedStep) -> Callable[[torch.optim.Optimizer], None]:
    """A hook: after load_state_dict the optimiser's tensors are others than those that were captured."""
    reference = weakref.ref(step)

    def hook(_: torch.optim.Optimizer) -> None:
        if (alive := reference()) is not None:
            alive._forget_graph()

    return hook
