"""Two gloo processes with an accelerated model learn what one process with the model as it was does.

`alone` is that one process: it draws the masks of both, one after the other, and takes the mean of their losses.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import maefast
from maefast import ops
from maefast.bench.peers.public.mae import Block, MaskedAutoencoderViT
from maefast.integrations import _worth
from tests.integrations.common import relative

WORLD, STEPS, BATCH = 2, 3, 2
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}  # of what three steps change in the parameters
FULL = StateDictOptions(full_state_dict=True)


def mae(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=2,
        decoder_num_heads=2,
        norm_pix_loss=True,
    ).to(dtype)


def vit_mae(dtype: torch.dtype) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            norm_pix_loss=True,
        )
    )
    with torch.no_grad():  # a fresh one has empty position tables
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.normal_(std=0.02)
    return model.to(dtype)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, MaskedAutoencoderViT):
        return [*model.blocks, *model.decoder_blocks]
    return [*model.vit.layers, *model.decoder.decoder_layers]


# --- training -----------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1000 + 10 * step + rank)
    images = torch.randn(BATCH, 3, 32, 32, dtype=dtype)
    out = model(images)
    return out[0] if isinstance(out, tuple) else out.loss


def train(model: nn.Module, losses_of: Callable[[int], Tensor]) -> list[float]:
    # Momentum and no AdamW: that one makes large steps of gradients which are zero but for rounding.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        loss = losses_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(model: nn.Module, dtype: torch.dtype) -> list[float]:
    return train(model, lambda step: sum(loss_of(model, step, rank, dtype) for rank in range(WORLD)) / WORLD)


def together(model: nn.Module, dtype: torch.dtype) -> list[float]:
    return [mean(loss) for loss in train(model, lambda step: loss_of(model, step, dist.get_rank(), dtype))]


def mean(loss: Tensor | float) -> float:
    """Of the losses of all processes."""
    total = torch.tensor(float(loss), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / WORLD


# --- the two processes --------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_parts(model: nn.Module) -> nn.Module:
    """Parts that accelerated code reads parameters of are sharded by themselves too."""
    mesh = init_device_mesh("cpu", (WORLD,))
    kinds = (nn.LayerNorm, nn.Linear, nn.Conv2d)
    for module in [m for m in model.modules() if isinstance(m, kinds)]:
        fully_shard(module, mesh=mesh)
    return fsdp2(model)


def fsdp2_halves(model: nn.Module) -> nn.Module:
    """Attention, feed-forward and patch embedding by themselves."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in blocks_of(model):
        fully_shard(block.attn if hasattr(block, "attn") else block.attention, mesh=mesh)
        fully_shard(block.mlp, mesh=mesh)
    fully_shard(model.patch_embed if hasattr(model, "patch_embed") else model.vit.embeddings, mesh=mesh)
    return fsdp2(model)


def fsdp1(model: nn.Module) -> nn.Module:
    kinds = {type(block) for block in blocks_of(model)}
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp1_parts(model: nn.Module) -> nn.Module:
    kinds = {type(b.attn if hasattr(b, "attn") else b.attention) for b in blocks_of(model)} | {nn.Conv2d}
    kinds |= {type(b.mlp) for b in blocks_of(model)}
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True, device_id=torch.device("cpu")
    )


def accelerated(model: nn.Module, wrap: Callable, order: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "nothing to accelerate here" among them
        warnings.filterwarnings("ignore", ".*[Pp]osition", UserWarning)
        if order == "after":
            model = maefast.accelerate(wrap(model))
            assert "wrapped_module" not in str(maefast.report(model))
            return model
        model = wrap(maefast.accelerate(model))
        if order == "restored":
            maefast.restore(model)
        if order == "again":
            maefast.accelerate(maefast.restore(model))
        return model


def compare(make: Callable, wrap: Callable, order: str, dtype: torch.dtype = torch.float32, recompute=False) -> None:
    """Losses and parameters after three steps, in every process; then weights go out and come back."""
    reference = make(dtype)
    start = copy.deepcopy(reference.state_dict())
    want = alone(reference, dtype)

    model = make(dtype)
    if recompute == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    elif recompute:
        model.gradient_checkpointing_enable()
    model = accelerated(model, wrap, order)
    with mock.patch.object(ops, "transformer_block", wraps=ops.transformer_block) as kernel:
        got = together(model, dtype)
    calls = 0 if order == "restored" else STEPS * len(blocks_of(reference)) * (2 if recompute else 1)
    if wrap in (ddp, fsdp2, fsdp1):  # where less than a block is sharded, it runs as it was
        assert kernel.call_count == calls
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5), (got, want)

    trained = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0 or wrap is ddp:
        assert list(trained) == list(start)
        for name, value in reference.state_dict().items():
            change = trained[name] - start[name]
            wanted = value - start[name]
            scale = max(wanted.norm().item(), 1e-4)
            assert (change - wanted).norm().item() <= TOLERANCE[dtype] * scale, name
    set_model_state_dict(model, start, options=FULL)
    assert mean(loss_of(model, 0, dist.get_rank(), dtype)) == pytest.approx(want[0], rel=1e-5)


def mixed_precision(make: Callable, order: str) -> None:
    """bfloat16 by FSDP2, which casts what goes into every block: as the model's own code under the same policy."""
    losses = []
    for fast in (False, True):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

        def wrap(model, policy=policy):
            mesh = init_device_mesh("cpu", (WORLD,))
            for block in blocks_of(model):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            return fully_shard(model, mesh=mesh, mp_policy=policy)

        model = make(torch.float32)
        model = accelerated(model, wrap, order) if fast else wrap(model)
        losses.append(torch.tensor(together(model, torch.float32)))
    assert relative(losses[1], losses[0]) < 1e-2, losses
    assert losses[1].isfinite().all()


def deepspeed_zero(make: Callable, stage: int, order: str | None) -> None:
    """DeepSpeed's engine steps; `leaf`: blocks are what ZeRO-3 gathers the parameters of at once. Without an `order`
    the model is as it was: then it is DeepSpeed and this test that are compared."""
    import deepspeed
    from deepspeed.utils import logger, set_z3_leaf_modules

    logger.setLevel(logging.ERROR)
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(WORLD), LOCAL_SIZE=str(WORLD))
    deepspeed.init_distributed("gloo")
    reference = make(torch.float32)
    start = copy.deepcopy(reference.state_dict())
    want = alone(reference, torch.float32)

    model = make(torch.float32)
    if order in ("before", "leaf"):
        maefast.accelerate(model)
    if order in ("leaf", "leaf after"):
        set_z3_leaf_modules(model, list({type(block) for block in blocks_of(reference)}))
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,  # 1.0 unless it is named
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if order in ("after", "leaf after"):
        maefast.accelerate(engine.module)
    got = []
    with mock.patch.object(ops, "transformer_block", wraps=ops.transformer_block) as kernel:
        for step in range(STEPS):
            loss = loss_of(engine, step, dist.get_rank(), torch.float32)
            engine.backward(loss)
            engine.step()
            got.append(mean(loss.detach()))
    fused = order is not None and (stage < 3 or order.startswith("leaf"))
    assert kernel.call_count == fused * STEPS * len(blocks_of(reference))
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5), (got, want)

    trained = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        for name, value in reference.named_parameters():
            if value.requires_grad:
                wanted = value.detach() - start[name]
                off = trained[name].detach() - start[name] - wanted
                assert off.norm().item() <= TOLERANCE[torch.float32] * max(wanted.norm().item(), 1e-4), name
    engine.destroy()


def process(rank: int, store: str, cases: list[tuple]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        for function, *arguments in cases:
            try:
                with _worth.always():
                    function(*arguments)
            except Exception as error:
                names = [getattr(a, "__name__", a) for a in (function, *arguments)]
                raise AssertionError(f"{' '.join(map(str, names))}: {error}") from error
    finally:
        dist.destroy_process_group()


def launch(store: str, cases: list[tuple]) -> None:
    """Both processes come from one that has only imported things, which takes longer than the cases do."""
    import transformers.models.vit_mae.modeling_vit_mae  # noqa: F401

    torch.multiprocessing.start_processes(process, (store, cases), nprocs=WORLD, start_method="fork")


def run(tmp_path, *cases: tuple) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=launch, args=(str(tmp_path / "store"), list(cases)))
    parent.start()
    parent.join(300)
    if parent.is_alive():
        parent.kill()
    assert parent.exitcode == 0, "see what it wrote to stderr"


# --- tests --------------------------------------------------------------------------------------------------

ORDERS = ("before", "after", "restored", "again")


def test_ddp(tmp_path):
    run(
        tmp_path,
        *[(compare, mae, ddp, order) for order in ORDERS],
        (compare, mae, ddp, "before", torch.float64),
        (compare, mae, ddp, "before", torch.float32, "wrapper"),
        (compare, vit_mae, ddp, "before"),
        (compare, vit_mae, ddp, "after"),
    )


def test_fsdp2(tmp_path):
    run(
        tmp_path,
        *[(compare, mae, fsdp2, order) for order in ORDERS],
        (compare, mae, fsdp2, "before", torch.float64),
        (compare, mae, fsdp2, "before", torch.float32, "wrapper"),
        (compare, mae, fsdp2_parts, "before"),
        (compare, mae, fsdp2_parts, "after"),
        (compare, mae, fsdp2_halves, "before"),
        (mixed_precision, mae, "before"),
        (compare, vit_mae, fsdp2, "before"),
        (compare, vit_mae, fsdp2, "after"),
        (compare, vit_mae, fsdp2, "before", torch.float32, True),
        (compare, vit_mae, fsdp2_halves, "before"),
        (mixed_precision, vit_mae, "after"),
    )


def test_fsdp1(tmp_path):
    run(
        tmp_path,
        *[(compare, make, fsdp1, order) for make in (mae, vit_mae) for order in ("before", "after")],
        (compare, mae, fsdp1, "again"),
        (compare, mae, fsdp1_parts, "before"),
        (compare, mae, fsdp1_parts, "after"),
        (compare, vit_mae, fsdp1_parts, "before"),
    )


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="could not import 'deepspeed'")
def test_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run(
        tmp_path,
        *[(deepspeed_zero, make, stage, "before") for make in (mae, vit_mae) for stage in (1, 2, 3)],
        *[(deepspeed_zero, mae, 3, order) for order in (None, "after", "leaf", "leaf after")],
        *[(deepspeed_zero, vit_mae, 3, order) for order in (None, "after", "leaf", "leaf after")],
        (deepspeed_zero, mae, 2, "after"),
    )
