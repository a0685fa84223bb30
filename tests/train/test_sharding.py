"""`--fsdp`: two gloo processes that hold shards see what one process sees, and checkpoints go from one to the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maefast.train import ConfigError, checkpoint, pretrain
from tests.recipes import test_dmae, test_lut
from tests.train import victims
from tests.train.common import convnet_config, losses, rows, run_together, tiny_config
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


def tensors(out, step):
    """The weights and the optimizer's tensors of a checkpoint, whatever it was written by."""
    path = out / "checkpoints" / f"step-{step:08d}"
    weights = checkpoint.load_weights(path / checkpoint.MODEL)
    if not (path / checkpoint.SHARDS).is_dir():
        return weights, checkpoint.load_weights(path / checkpoint.OPTIMIZER)
    found = {}
    reader = torch.distributed.checkpoint.FileSystemReader(path / checkpoint.SHARDS)
    for key, about in reader.read_metadata().state_dict_metadata.items():
        found[key] = torch.zeros(about.size)
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
    return weights, found


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


def test_shards_learn_what_one_process_learns(alone, photos, tmp_path):
    assert run_together(victims.train_as, 2, pair(photos, tmp_path / "out", picture_rows=2, picture_every=3)) == [0, 0]
    assert_same_sequence(losses(tmp_path / "out"), losses(alone))
    norms = [[float(row["grad_norm"]) for row in rows(out)] for out in (tmp_path / "out", alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    close(tensors(tmp_path / "out", 8), tensors(alone, 8))
    assert (tmp_path / "out" / "reconstruction.png").is_file()
    assert (tmp_path / "out" / "pictures" / "step-00000006.png").is_file()
    shards = sorted((tmp_path / "out" / "checkpoints" / "step-00000008" / "optimizer").glob("*.distcp"))
    assert len(shards) == 2  # each process wrote its own
    sizes = [path.stat().st_size for path in shards]
    assert min(sizes) > 0.3 * sum(sizes)


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
