"""Files as training loops, wrappers and other libraries really write them."""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import json
import pathlib
import pickle
import traceback

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maefast.models import load_checkpoint, read_state_dict
from maefast.models.checkpoint import read_content
from maefast.models.convert import encoder_state
from maefast.models.unwrap import Ambiguous
from tests.models.common import small


@pytest.fixture(scope="module")
def model():
    return small(torch.float32)


def equal(state, model) -> bool:
    own = model.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


def other(model, value=0.5):
    """A second set of weights for the same names."""
    return {key: tensor + value for key, tensor in model.state_dict().items()}


# --- wrappings -----------------------------------------------------------------------------------------------

WORDS = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "net.", "mae_model.", "backbone.")
KEYS = ("model", "state_dict", "model_state_dict", "module", "network", "weights")


@pytest.mark.parametrize("words", [(), *((w,) for w in WORDS), *itertools.permutations(WORDS[:4], 2), WORDS[:3]])
@pytest.mark.parametrize("keys", [(), ("model",), ("state_dict", "model")])
def test_any_order_and_nesting_of_wrappers(model, tmp_path, words, keys):
    content = {"".join(words) + key: value for key, value in model.state_dict().items()}
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)


@pytest.mark.parametrize("key", KEYS)
def test_every_usual_key(model, tmp_path, key):
    torch.save({"epoch": 1, key: model.state_dict(), "best": torch.tensor(0.1)}, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)


def test_wrappers_inside_the_names(model, tmp_path):
    """torch.compile, DDP or FSDP around a part: the word stands in the middle."""
    state = {
        key.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.", "_checkpoint_wrapped_module.attn."): value
        for key, value in model.state_dict().items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    assert equal(read_state_dict(tmp_path / "weights.safetensors"), model)


def test_beside_an_optimizer_and_other_modules(model, tmp_path):
    """Adam's moments have the shapes of the weights, a probe has names of its own, a loss has buffers."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {"probe.weight": torch.zeros(3, 4), "loss.centre": torch.zeros(4)}
    content = {"state_dict": state, "optimizer": optimizer.state_dict(), "ema_loss": torch.zeros(())}
    torch.save(content, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)


@pytest.mark.parametrize("place", ["model_ema", "ema", "ema_state_dict", "state_dict_ema", "teacher"])
def test_averages(model, tmp_path, place):
    torch.save({"model": model.state_dict(), place: other(model)}, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)
    averaged = read_state_dict(tmp_path / "weights.pth", ema=True)
    assert all(torch.equal(averaged[key], value) for key, value in other(model).items())
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r'no averaged copy.*found "model"'):
        read_state_dict(tmp_path / "plain.pth", ema=True)


def test_averages_by_prefix(model, tmp_path):
    """Student and teacher in one module."""
    state = {f"student.{key}": value for key, value in model.state_dict().items()}
    state |= {f"teacher.{key}": value for key, value in other(model).items()}
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    assert equal(read_state_dict(tmp_path / "weights.ckpt"), model)
    content = read_content(tmp_path / "weights.ckpt", ema=True)
    assert content.averaged
    assert "teacher." in content.place
    assert all(torch.equal(content.tensors[key], value) for key, value in other(model).items())


def test_averages_of_torch(model, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"ema": averaged.state_dict(), "model": other(model)}, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth", ema=True), model)
    torch.save(averaged.state_dict(), tmp_path / "alone.pth")
    for ema in (False, True):  # there is nothing else in it
        assert equal(read_state_dict(tmp_path / "alone.pth", ema=ema), model)


@pytest.mark.parametrize("key", ["EMA", "Teacher", "modelEma", "averaged_model", "swa_model", "momentum_encoder"])
def test_averages_in_any_spelling(model, tmp_path, key):
    torch.save({"model": model.state_dict(), key: other(model)}, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)
    averaged = read_state_dict(tmp_path / "weights.pth", ema=True)
    assert all(torch.equal(averaged[name], value) for name, value in other(model).items())


@pytest.mark.parametrize("key", ["exp_avg", "momentum", "momentum_buffer", "best", "init_state", "grads"])
def test_other_things_with_the_same_names(model, tmp_path, key):
    """Moments of an optimizer, the best weights so far: the usual key wins, and the others are named."""
    torch.save({"model": model.state_dict(), key: other(model)}, tmp_path / "weights.pth")
    content = read_content(tmp_path / "weights.pth")
    assert equal(content.tensors, model)
    assert content.place == f'"model" (there are also "{key}")'
    with pytest.raises(Ambiguous, match="no averaged copy"):
        read_state_dict(tmp_path / "weights.pth", ema=True)


def test_an_average_that_counts(model, tmp_path):
    """ema_pytorch keeps both and its counters in one state dict."""
    state = {f"online_model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"ema_model.{key}": value for key, value in other(model).items()}
    state |= {"initted": torch.tensor(True), "step": torch.tensor(3)}
    torch.save(state, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)
    averaged = read_state_dict(tmp_path / "weights.pth", ema=True)
    assert all(torch.equal(averaged[name], value) for name, value in other(model).items())


def test_lists_and_words_that_look_like_an_optimizer_s(model, tmp_path):
    for content in (
        {"models": [model.state_dict()]},
        {"model": {0: model.state_dict()}},
        {"scheduled_model": model.state_dict()},
        {"optimal": model.state_dict(), "version": torch.__version__},
        {"model": model.state_dict(), "encoder": encoder_state(model.state_dict())},
    ):
        torch.save(content, tmp_path / "weights.pth")
        assert equal(read_state_dict(tmp_path / "weights.pth"), model)


def test_networks_of_one_s_own(tmp_path):
    """Names that say nothing: the usual keys, copies, and averages on request."""
    net, mean = nn.Linear(2, 2), nn.Linear(2, 2)
    for content in (
        {"model": net.state_dict(), "state_dict": net.state_dict(), "best": torch.tensor(0.5)},
        {"model": net.state_dict(), "model_ema": mean.state_dict()},
        net.state_dict(),
    ):
        torch.save(content, tmp_path / "weights.pth")
        target = load_checkpoint(nn.Linear(2, 2), tmp_path / "weights.pth")
        assert torch.equal(target.weight, net.weight)
    torch.save({"model": net.state_dict(), "model_ema": mean.state_dict()}, tmp_path / "weights.pth")
    target = load_checkpoint(nn.Linear(2, 2), tmp_path / "weights.pth", ema=True)
    assert torch.equal(target.weight, mean.weight)
    torch.save({"model": net.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(Ambiguous, match="no averaged copy"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "weights.pth", ema=True)


def test_names_that_fit_are_taken_as_they_are(model, tmp_path):
    """A module of the user's own around a masked autoencoder reads its own checkpoint."""

    class Wrapper(nn.Module):
        def __init__(self, mae):
            super().__init__()
            self.encoder, self.probe = mae, nn.Linear(2, 2)

    source, target = Wrapper(copy.deepcopy(model)), Wrapper(small(torch.float32, seed=1))
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_files_by_their_content_not_their_name(model, tmp_path):
    for name in ("a.SafeTensors", "b", "c.ckpt"):
        save_file(model.state_dict(), tmp_path / name)
        assert equal(read_state_dict(tmp_path / name), model)
    for name in ("d.PTH", "e.safetensors", "f.bin"):
        torch.save({"model": model.state_dict()}, tmp_path / name)
        assert equal(read_state_dict(tmp_path / name), model)


def test_two_models_are_never_confused(model, tmp_path):
    torch.save({"a": model.state_dict(), "b": other(model)}, tmp_path / "weights.pth")
    with pytest.raises(Ambiguous, match='2 models: "a", "b"'):
        read_state_dict(tmp_path / "weights.pth")
    torch.save({"a": model.state_dict(), "b": model.state_dict()}, tmp_path / "weights.pth")  # the same twice
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)


# --- Lightning -----------------------------------------------------------------------------------------------


def lightning_file(model, path, average=False):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, options, folder):
            super().__init__()
            self.save_hyperparameters()
            self.mae, self.probe = model, nn.Linear(2, 2)

        def training_step(self, batch, index):
            return self.mae(batch[0])[0] + self.probe.weight.sum()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    class Save(lightning.pytorch.callbacks.Callback):  # while training: at its end the average replaces the weights
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    callbacks = [lightning.pytorch.callbacks.WeightAveraging()] * average + [Save()]
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=path.parent, callbacks=callbacks,
    )  # fmt: skip
    module = Module(argparse.Namespace(lr=np.float64(1e-3), data=path.parent), path.parent)
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32))
    trainer.fit(module, torch.utils.data.DataLoader(images, 4))


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    model = small(torch.float32)
    lightning_file(model, tmp_path / "last.ckpt")
    content = read_content(tmp_path / "last.ckpt")
    assert equal(content.tensors, model)
    assert content.place == "\"state_dict\" names behind 'mae.'"
    assert not content.averaged


@pytest.mark.filterwarnings("ignore")
def test_lightning_averages(tmp_path):
    model = small(torch.float32)
    lightning_file(model, tmp_path / "last.ckpt", average=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=False)
    own = {key: content["current_model_state"][f"mae.{key}"] for key in model.state_dict()}
    mean = {key: content["state_dict"][f"mae.{key}"] for key in model.state_dict()}
    plain, ema = (read_state_dict(tmp_path / "last.ckpt", ema=ema) for ema in (False, True))
    assert all(torch.equal(plain[key], own[key]) for key in own)
    assert all(torch.equal(ema[key], mean[key]) for key in own)
    assert not torch.equal(own["norm.bias"], mean["norm.bias"])


# --- what lies beside the weights ----------------------------------------------------------------------------


def test_records_beside_the_weights(model, tmp_path):
    options = argparse.Namespace(
        data=pathlib.Path("/data"), other=pathlib.PureWindowsPath("c:/data"), lr=np.float64(1e-3), seed=np.int64(3),
        flag=np.bool_(True), devices={0, 1}, span=range(3), table=np.arange(3), nested=argparse.Namespace(a=1),
    )  # fmt: skip
    content = {"model": model.state_dict(), "args": options, "history": collections.OrderedDict(loss=[np.float32(1)])}
    torch.save(content, tmp_path / "weights.pth")
    assert equal(read_state_dict(tmp_path / "weights.pth"), model)


def test_names_of_older_numpy(model, tmp_path):
    """numpy 1 wrote its scalars as numpy.core.multiarray.scalar."""
    torch.save(
        {"model": model.state_dict(), "loss": np.float64(1)},
        tmp_path / "old.pth",
        pickle_protocol=2,
        _use_new_zipfile_serialization=False,
    )
    legacy = (tmp_path / "old.pth").read_bytes()
    assert b"cnumpy._core.multiarray\n" in legacy
    (tmp_path / "old.pth").write_bytes(legacy.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert equal(read_state_dict(tmp_path / "old.pth"), model)


class Strange:
    def __init__(self):
        self.value = 1


def test_what_could_run_code_is_refused_by_name(model, tmp_path):
    torch.save({"model": model.state_dict(), "config": Strange()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"test_reading\.Strange, which is not loaded") as caught:
        read_state_dict(tmp_path / "weights.pth")
    assert len(str(caught.value).splitlines()) == 2
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(pickle.UnpicklingError, match="save its state_dict"):
        read_state_dict(tmp_path / "whole.pth")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_plain_pickle_is_refused_by_the_name_of_its_class(model, tmp_path, recwarn, protocol):
    """And without torch's advice, which is to run it."""
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"w": torch.zeros(2), "a": Strange()}, protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match=r"test_reading\.Strange") as caught:
        read_state_dict(tmp_path / "weights.pkl")
    told = "".join(traceback.format_exception(caught.value))
    assert str(tmp_path / "weights.pkl") in told
    assert "state_dict()" in told
    assert "likely succeed" not in told
    assert not recwarn.list


def test_a_plain_pickle_of_numbers(tmp_path):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    with pytest.raises(RuntimeError, match=r"weights\.pkl is a plain pickle, which is not loaded"):
        read_state_dict(tmp_path / "weights.pkl")


def test_a_run_names_its_newest_checkpoint(model, tmp_path):
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "state.json").write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(FileNotFoundError, match=r"is a run, .* the newest is \S+step-00000010"):
        load_checkpoint(model, tmp_path)
    load_checkpoint(model, folder)


def test_the_message_says_what_was_found_and_tried(tmp_path):
    content = {"epoch": 3, "model": {"layer.weight": torch.zeros(2)}, "ema": {"layer.weight": torch.zeros(2)}, "x": {}}
    torch.save({**content, "other": {"layer.weight": torch.zeros(2)}}, tmp_path / "weights.pth")
    assert read_state_dict(tmp_path / "weights.pth").keys() == {"layer.weight"}  # of a network that is not known
    torch.save({"epoch": 3, "a": {"w": torch.zeros(2)}, "b": {"w": torch.ones(2)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no weights of a known model") as caught:
        read_state_dict(tmp_path / "weights.pth")
    found, tried = str(caught.value).splitlines()
    assert 'In it: "epoch" (int), "a" (1 tensors: w), "b" (1 tensors: w)' in found
    assert tried.startswith("Tried: ")


# --- folders and pieces --------------------------------------------------------------------------------------


def test_a_file_in_pieces(model, tmp_path):
    state = model.state_dict()
    names = sorted(state)
    files = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / file)
        files.update(dict.fromkeys(part, file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert equal(read_state_dict(tmp_path), model)
    assert equal(read_state_dict(tmp_path / "model.safetensors.index.json"), model)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint found at .*: none of model\.safetensors"):
        read_state_dict(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(FileNotFoundError, match="dcp_to_torch"):
        read_state_dict(tmp_path)


def test_distributed_checkpoints_by_the_way_that_is_named(model, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "weights.pth")
    target = small(torch.float32, seed=1)
    assert equal(load_checkpoint(target, tmp_path / "weights.pth", say=print).state_dict(), model)
