"""`--fsdp`: two gloo processes that hold shards see what one process sees, and checkpoints go from one to the other."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from maefast.models import read_state_dict, shards
from maefast.train import CheckpointError, ConfigError, PretrainConfig, checkpoint, pretrain
from maefast.train.build import build_recipe
from maefast.train.export import export_file
from maefast.train.reconstruct import reconstruct_files
from maefast.train.reopen import open_recipe
from maefast.train.schedule import make_optimizer
from maefast.train.weights import open_weights
from tests.recipes import test_dmae, test_lut
from tests.train import victims
from tests.train.common import assert_equal, convnet_config, losses, rows, run_together, tensors, tiny_config
from tests.train.test_distributed import assert_same_sequence

STEPS = {"lr": None, "blr": 0.3, "clip": 1.0, "steps": 8, "save_every": 4}


def one(photos, out, **changes):
    return tiny_config(photos, out, **{"batch_size": 8, **STEPS, **changes})


def pair(photos, out, **changes):
    return one(photos, out, **{"batch_size": 4, "fsdp": True, **changes})


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    pretrain(one(photos, out, picture_rows=2))
    return out


@pytest.fixture(scope="module")
def sharded(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "out"
    assert run_together(victims.train_as, 2, pair(photos, out, picture_rows=2, picture_every=3)) == [0, 0]
    return out


@pytest.fixture(scope="module")
def gathered(sharded, tmp_path_factory):
    """The same run with its last checkpoint as older versions wrote it, the weights in one file."""
    out = tmp_path_factory.mktemp("gathered") / "out"
    shutil.copytree(sharded, out)
    path = out / "checkpoints" / "step-00000008"
    state = json.loads((path / "state.json").read_text())
    about = {"format": "pt", "maefast": json.dumps(state["model_config"])}
    save_file(shards.read(path / "model"), path / checkpoint.MODEL, about)
    shutil.rmtree(path / "model")
    state["files"] = {name: size for name, size in state["files"].items() if not name.startswith("model/")}
    state["files"][checkpoint.MODEL] = (path / checkpoint.MODEL).stat().st_size
    (path / "state.json").write_text(json.dumps(state))
    return out


def close(one, other):
    for mine, theirs in zip(one, other):
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            other = theirs[key]
            if (
                key.endswith("qkv.bias") and tensor.ndim
            ):  # that of keys has no gradient but rounding, which Adam makes large
                tensor, other = (torch.cat(t.chunk(3)[::2]) for t in (tensor, other))
            torch.testing.assert_close(tensor, other, rtol=2e-3, atol=2e-5, msg=key)


def test_shards_learn_what_one_process_learns(alone, sharded):
    assert_same_sequence(losses(sharded), losses(alone))
    norms = [[float(row["grad_norm"]) for row in rows(out)] for out in (sharded, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    close(tensors(sharded, 8), tensors(alone, 8))
    assert (sharded / "reconstruction.png").is_file()
    assert (sharded / "pictures" / "step-00000006.png").is_file()
    path = sharded / "checkpoints" / "step-00000008"
    assert sorted(file.name for file in path.iterdir()) == ["model", "optimizer", "state.json"]
    for kind in ("model", "optimizer"):  # each process wrote its own
        sizes = [file.stat().st_size for file in (path / kind).glob("*.distcp")]
        assert len(sizes) == 2
        assert min(sizes) > 0.3 * sum(sizes)


@pytest.mark.parametrize("world", [3, 1])
@pytest.mark.parametrize("kind", ["sharded", "gathered"])
def test_any_number_of_processes_holds_what_was_written(sharded, request, tmp_path, world, kind):
    path = request.getfixturevalue(kind) / "checkpoints" / "step-00000008"
    if world > 1:
        assert run_together(victims.save_again, world, path, tmp_path / "checkpoints") == [0] * world
    else:
        state = checkpoint.read_state(path)
        model = build_recipe(PretrainConfig(**state.config), None).network
        optimizer = make_optimizer(model, 0.05)
        checkpoint.restore(path, model, optimizer)
        checkpoint.save(tmp_path / "checkpoints", state, model, optimizer)
    assert_equal(tensors(tmp_path, 8), tensors(sharded, 8))


def test_a_run_in_shards_goes_on_bit_for_bit(sharded, photos, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    (out / "checkpoints" / "step-00000008").rename(tmp_path / "set aside")
    assert run_together(victims.train_as, 2, pair(photos, out, picture_rows=2)) == [0, 0]
    assert losses(out) == losses(sharded)
    assert_equal(tensors(out, 8), tensors(sharded, 8))


def test_moments_in_bfloat16(photos, tmp_path):
    """An interrupted run goes on bit for bit, and one process reads its shards. There sums are rounded otherwise, so
    other dice fall."""
    config = pair(photos, tmp_path / "out", optim_state="bf16")
    assert run_together(victims.train_as, 2, config) == [0, 0]
    written = losses(tmp_path / "out"), tensors(tmp_path / "out", 8)
    kinds = {(key.split(".")[0], tensor.dtype) for key, tensor in written[1][1].items()}
    assert kinds == {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16), ("step", torch.float32)}
    path = tmp_path / "out" / "checkpoints" / "step-00000008"
    path.rename(tmp_path / "step-00000008")
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert losses(tmp_path / "out") == written[0]
    assert_equal(tensors(tmp_path / "out", 8), written[1])
    path.rename(tmp_path / "set aside")
    pretrain(one(photos, tmp_path / "out", optim_state="bf16"))  # from step 4
    assert [float(loss) for _, loss, _ in losses(tmp_path / "out")] == pytest.approx(
        [float(loss) for _, loss, _ in written[0]], rel=1e-2
    )
    assert {tensor.dtype for tensor in tensors(tmp_path / "out", 8)[1].values()} == {torch.bfloat16, torch.float32}


def test_whatever_reads_weights_reads_shards(sharded, gathered, photos, tmp_path):
    places = ["", "checkpoints/step-00000008", "checkpoints/step-00000008/model"]
    sources = [sharded / place for place in places] + [gathered / place for place in places[:2]]
    for number, source in enumerate(sources):
        export_file(source, tmp_path / f"{number}.safetensors", "mae")
        again = open_recipe(source)
        assert again.step == 8
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.bias"):  # it needs no decoder
            assert torch.equal(again.recipe.network.state_dict()[name], tensors(sharded, 8)[0][name])
    files = [open_weights(tmp_path / f"{number}.safetensors") for number in range(len(sources))]
    assert_equal([file.tensors for file in files], [tensors(sharded, 8)[0]] * len(sources))
    assert all(file.config == files[-1].config for file in files)
    assert files[-1].config
    assert_equal([read_state_dict(sources[1])], [tensors(sharded, 8)[0]])
    for source in (sharded, gathered):
        reconstruct_files(source, sorted(photos.rglob("*.png"))[:2], tmp_path / f"{source.parent.name}.png")
        config = one(photos, tmp_path / source.parent.name, init_from=str(source), steps=1)
        pretrain(config)
    assert len({losses(tmp_path / source.parent.name)[0] for source in (sharded, gathered)}) == 1
    one_picture, other = [(tmp_path / f"{source.parent.name}.png").read_bytes() for source in (sharded, gathered)]
    assert one_picture == other


def test_recipes_read_shards(tmp_path):
    toy = test_lut.TestLUT()
    config = toy.config(tmp_path / "out", batch_size=2, steps=2, fsdp=True)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    again = open_recipe(tmp_path / "out", ema=False)
    assert_equal([again.recipe.network.state_dict()], [tensors(tmp_path / "out", 2)[0]])


def test_a_broken_shard_is_named(sharded, tmp_path):
    path = tmp_path / "checkpoints" / "step-00000008"
    shutil.copytree(sharded / "checkpoints" / "step-00000008", path)
    file = path / "model" / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model/__1_0.distcp has \d+ bytes instead of"):
        checkpoint.read_state(path)
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(CheckpointError, match="model cannot be read"):
        export_file(path, tmp_path / "weights.pth", "mae")


def test_nothing_in_an_index_runs(sharded, tmp_path):
    path = tmp_path / "checkpoints" / "step-00000008"
    shutil.copytree(sharded / "checkpoints" / "step-00000008", path)
    index = path / "model" / ".metadata"
    size = index.stat().st_size
    index.write_bytes(pickle.dumps(print).ljust(size, b"\0"))
    with pytest.raises(CheckpointError, match=r"holds an object of builtins\.print, which is not loaded"):
        open_recipe(path)


def test_accumulation(alone, photos, tmp_path):
    config = pair(photos, tmp_path / "out", batch_size=2, accum=2)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert_same_sequence(losses(tmp_path / "out"), losses(alone))


@pytest.mark.parametrize(("first", "second"), [("two", "one"), ("one", "two"), ("two", "four"), ("two", "plain two")])
def test_another_number_of_processes_goes_on(alone, photos, tmp_path, first, second):
    def run(kind):
        world = {"one": 1, "two": 2, "plain two": 2, "four": 4}[kind]
        config = one(photos, tmp_path / "out", batch_size=8 // world, fsdp=kind in ("two", "four"))
        if world == 1:
            pretrain(config)
        else:
            assert run_together(victims.train_as, world, config) == [0] * world

    run(first)
    (tmp_path / "out" / "checkpoints" / "step-00000008").rename(tmp_path / "set aside")
    run(second)  # from step 4
    assert_same_sequence(losses(tmp_path / "out"), losses(alone))
    close(tensors(tmp_path / "out", 8), tensors(alone, 8))


@pytest.mark.parametrize("toy", [test_dmae.TestDMAE(), test_lut.TestLUT()], ids=lambda toy: toy.name)
def test_recipes_with_teachers(tmp_path, toy):
    """A frozen one beside the recipe, and a running average in it. Batch norms of LUT see one process's samples."""
    same = toy.name != "lut"
    config = toy.config(tmp_path / "one", batch_size=8, steps=4)
    pretrain(config)
    config = replace(config, batch_size=4, fsdp=True, output_dir=str(tmp_path / "two"))
    assert run_together(victims.train_as, 2, config) == [0, 0]
    said = [line for line in (tmp_path / "rank0.txt").read_text().splitlines() if line.startswith("on the images")]
    assert len(said) == 1  # held against a trivial predictor
    both = [losses(tmp_path / name) for name in ("one", "two")]
    if same:
        assert_same_sequence(*both)
    weights = [tensors(tmp_path / name, 4)[0] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    if not same:  # the average follows what is trained
        key = "teacher.encoder.blocks.0.mlp.fc1.weight"
        assert 0 < (weights[1][key] - weights[1][key.removeprefix("teacher.")]).abs().max() < 0.1


def test_convnets(photos, tmp_path):
    config = convnet_config("toy_spark", photos, tmp_path / "out", fsdp=True, steps=2)
    assert run_together(victims.train_as, 2, config) == [0, 0]
    assert len(rows(tmp_path / "out")) == 2


def test_a_checkpoint_that_cannot_be_written_ends_all_processes(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("in the way")
    assert all(run_together(victims.train_as, 2, pair(photos, tmp_path / "out", save_every=2)))
    assert not rows(tmp_path / "out")[2:]  # not more than the steps before it


def test_where_it_cannot_be(photos, tmp_path):
    with pytest.raises(ConfigError, match="--fsdp: there is one process: start several, as torchrun"):
        pretrain(one(photos, tmp_path / "out", fsdp=True))
