"""One peer in a process of its own, so that its peak memory is its own. `bench.step` and `bench.dropin` talk to it in
JSON lines.

    -> {"do": "build", ...}             <- {"loss": ..., "grad_norm": ..., "parameters": ..., notes of the task}
    -> {"do": "exact"}                  <- {"loss": ..., "grad_norm": ...}, of the same step in float64; before any run
    -> {"do": "run", "steps": 2}        <- {"seconds": [...], "loss": ...}
    -> {"do": "memory"}                 <- {"peak_bytes": ...}
    -> {"do": "flops"}                  <- {"flops": of the products, convolutions and attention of a step}
An exception comes back as {"error": "..."}. What is trained comes from a module of this package, the `source`:
load(peer, **request) imports what it needs, task(peer, ...) -> Task builds it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from maefast._memory import release_freed
from maefast.bench.environment import exact_float32
from maefast.bench.machine import count_flops
from maefast.graphs import graphed_step

ATTEMPTS = 6


class Worker:
    def build(
        self,
        peer: str,
        config: dict,
        batch: int,
        dtype: str,
        device: str,
        part: str = "step",
        source: str = "models",
        **what,
    ) -> dict:
        self.device, self.bf16, self.part = device, dtype == "bfloat16", part
        exact_float32()
        module = importlib.import_module(f"maefast.bench.peers.{source}")
        module.load(peer, config)  # before the baseline: a library in memory is not a step's memory
        self.baseline = resident_bytes()
        self.task = module.task(peer, config=config, batch=batch, device=device, part=part, **what)
        self.done = 0

        parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        reset_peak(device)
        self.graphed = None
        loss = self._first_backward()
        count = sum(p.numel() for p in parameters)
        answer = {"loss": loss.item(), "grad_norm": self._grad_norm(), "parameters": count, **self.task.notes}
        if self.task.graphed:
            del loss  # and with it the autograd graph, which remembers another stream
            self.graphed = graphed_step(
                self.task.model,
                self.optimizer,
                loss=self.task.loss,
                autocast=torch.bfloat16 if self.bf16 else None,
                warmup=2,
            )
        self._give_back()
        return answer

    def exact(self) -> dict:
        """The first step once more with everything in float64. Weights and data are float32 again after it."""
        data, bf16 = self.task.data, self.bf16
        try:
            self.optimizer.zero_grad(set_to_none=True)
            self.task.model.double()
            self.task.data = [tuple(_to(t, torch.float64) for t in inputs) for inputs in data]
            self.bf16 = False
            loss = self._first_backward()
            return {"loss": loss.item(), "grad_norm": self._grad_norm()}
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.task.model.float()
            self.task.data, self.bf16 = data, bf16

    def _grad_norm(self) -> float:
        grads = [p.grad for p in self.task.model.parameters() if p.grad is not None]
        return torch.stack([grad.double().norm() for grad in grads]).norm().item()

    def run(self, steps: int) -> dict:
        """One step that is not counted (another process was here just now), then `steps` steps."""
        self._step()
        self._wait()
        seconds = []
        start = time.perf_counter()
        for _ in range(steps):
            loss = self._step()
            if self.device == "cpu":
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
        if self.device != "cpu":  # a wait after every step would add a gap to each
            self._wait()
            seconds = [(time.perf_counter() - start) / steps]
        answer = {"seconds": seconds, "loss": loss.item()}
        del loss
        self._give_back()
        return answer

    def memory(self) -> dict:
        """peak_bytes: of all of training; step_bytes: of one more step, above what was held before it (parameters and
        optimizer states, no gradients)."""
        if self.device == "cuda":
            found = {"peak_bytes": torch.cuda.max_memory_allocated(), "baseline_bytes": 0}
        else:
            found = {"peak_bytes": max(peak_bytes() - self.baseline, 1), "baseline_bytes": self.baseline}
        if self.graphed is not None:
            return found  # its memory is held all the time
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        self._wait()
        release_freed()  # or it would count as held before a step
        reset_peak(self.device)
        before = torch.cuda.memory_allocated() if self.device == "cuda" else resident_bytes()
        self._step()
        self._wait()
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_bytes()
        return {**found, "step_bytes": max(peak - before, 1)}

    def flops(self) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        return {"flops": count_flops(self._backward)}

    def _step(self) -> torch.Tensor:
        if self.graphed is not None:
            return self.graphed(*self._inputs())
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward()
        if self.part == "step":
            self.optimizer.step()
        return loss.detach()

    def _inputs(self) -> tuple[torch.Tensor, ...]:
        inputs = self.task.data[self.done % len(self.task.data)]
        self.done += 1
        return inputs

    def _first_backward(self) -> torch.Tensor:
        """On a GPU all peers are built at once; one that finds no room waits until others have given theirs back."""
        for attempt in range(ATTEMPTS):
            torch.manual_seed(2)  # models that draw their masks themselves draw the same ones
            self.done = 0
            try:
                return self._backward()
            except torch.OutOfMemoryError:
                if attempt == ATTEMPTS - 1:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            self._give_back()
            time.sleep(5)
        raise AssertionError

    def _give_back(self) -> None:
        """Memory that is free, for the other peers on the device; the step that is not counted takes it again."""
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _backward(self) -> torch.Tensor:
        inputs = self._inputs()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.task.loss(*inputs)
        loss.backward()
        return loss

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _to(value, dtype: torch.dtype):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def resident_bytes() -> int:
    return _status("VmRSS") or 0


def peak_bytes() -> int:
    # ru_maxrss starts from the parent's peak where a process was forked; VmHWM is this process's own.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Where that is forbidden the peak also covers the building of the model, of every peer alike.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    # Whatever a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
