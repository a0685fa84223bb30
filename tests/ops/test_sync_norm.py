"""batch_norm_act over two processes: statistics and gradients are those of one process with every row."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from maefast import ops
from maefast.ops import _dispatch

from .common import assert_close

ROWS = (37, 5), (0, 64)  # different counts on each rank; one rank without any row
CHANNELS = 24


def case(rows: tuple[int, int]) -> list[torch.Tensor]:
    """x, residual, grad of all rows; weight, bias."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(rows), CHANNELS)
    tensors = [torch.randn(s, generator=generator) for s in (shape, shape, shape, shape[1:], shape[1:])]
    tensors[0][: rows[0]] += 30  # the ranks' means differ
    return tensors


def run(x, residual, grad, weight, bias, group, backend, act):
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    mean, var = torch.zeros(CHANNELS, dtype=weight.dtype), torch.ones(CHANNELS, dtype=weight.dtype)
    y = ops.batch_norm_act(
        leaves[0], *leaves[2:], mean, var, True, 0.1, 1e-5, act, leaves[1], process_group=group, backend=backend
    )
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad)]


def penalty(x, residual, grad, weight, bias, group) -> torch.Tensor:
    """The gradient of x of a penalty on the gradient of x: the reference has it."""
    x = x.clone().requires_grad_()
    y = ops.batch_norm_act(x, weight, bias, residual=residual, process_group=group, backend="reference")
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def worker(rank: int, port: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        results = []
        for rows in ROWS:
            for act in ("none", "relu"):
                *big, weight, bias = case(rows)
                mine = [t.split(rows)[rank] for t in big]
                results.append(run(*mine, weight, bias, dist.group.WORLD, backend, act))
                if backend == "reference":
                    doubles = (t.double() for t in (*mine, weight, bias))
                    results[-1].append(penalty(*doubles, dist.group.WORLD))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_processes_are_one(backend, tmp_path):
    if (reason := _dispatch.unavailable("norm_act", backend, "cpu")) is not None:
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, backend, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    cases = [(rows, act) for rows in ROWS for act in ("none", "relu")]
    for (rows, act), one, two in zip(cases, first, second):
        want = run(*(t.double() for t in case(rows)), None, "reference", act)
        for i in (0, 3, 4):  # y, and the gradients of x and residual: rows
            assert_close(torch.cat([one[i], two[i]]), want[i], torch.float32)
        for i in (1, 2):  # running statistics: the same on every rank
            assert torch.equal(one[i], two[i])
            assert_close(one[i], want[i], torch.float32)
        if backend == "reference":
            twice = penalty(*(t.double() for t in case(rows)), None)
            assert_close(torch.cat([one[7], two[7]]), twice, torch.float32)
        for i in (5, 6):  # parameters: each rank its own rows, for DDP to sum
            assert_close(one[i] + two[i], want[i], torch.float32)
