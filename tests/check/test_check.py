"""`maefast accelerate-check`: what is replaced, whether it is the same, how fast it is; and that it can fail."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import maefast
from maefast import cli, integrations
from maefast.check import Check, accelerate_check, run, speed
from maefast.errors import ConfigError

SMALL = {"batch_size": 2, "device": "cpu", "seconds": 0.01}


def check(users, name="mae", **options) -> Check:
    options = {**SMALL, **options}
    if "batch" in options:
        del options["batch_size"]
    return accelerate_check(f"{users}:{name}", say=lambda text: None, **options)


def text(found: Check) -> str:
    stream = io.StringIO()
    found.show(Console(file=stream, width=160))
    return stream.getvalue()


@pytest.fixture
def quick(monkeypatch):
    """Without the profiler, whose first start takes a while."""
    monkeypatch.setattr(speed, "peak", lambda step, model, device: step() or 2**20)


def changed(monkeypatch, change):
    """`accelerate` also does something that it should not."""
    real = integrations.accelerate

    def wrong(model):
        real(model)
        change(model)
        return model

    monkeypatch.setattr(run.integrations, "accelerate", wrong)


def draw(model):
    """A random number more than it should."""
    model.register_forward_hook(lambda *given: (torch.rand(1), None)[1])


# --- what is found ------------------------------------------------------------------------------------------


def test_replaced_and_equal(users, always):
    found = check(users)
    assert (found.status, found.equal) == (0, True)
    assert found.report.families == ["facebookresearch/mae"]
    assert found.given == "imgs [2, 3, 32, 32]; a guess from the model"
    assert [d.what for d in found.parity] == [
        "outputs", "random numbers", "gradients of the loss", "gradients of all outputs",
    ]  # fmt: skip
    assert all(0 <= d.value <= d.allowed < 1e-2 for d in found.parity)
    assert found.speed.rounds == speed.ROUNDS[0]
    assert found.speed.spread[0] <= found.speed.ratio <= found.speed.spread[1]
    assert all(0 < seconds < 60 for seconds in found.speed.seconds)
    assert all(size > 100_000 for size in found.speed.memory)
    said = text(found)
    for part in ("facebookresearch/mae", "blocks.0-1", "calls since then", "ran fast", "forward + backward, ms",
                 "memory of a step, MiB", "gradients of the loss", "Replaced, and equal up to rounding"):  # fmt: skip
        assert part in said


def test_too_small_to_be_worth_it(users, quick):
    found = check(users)
    assert found.status == 0
    assert found.verdict == "Replaced, but all of it ran as it was with this input: see the calls above."
    assert "below 2,359,296 (tokens x width^2) float32 is quicker as it was on a CPU" in text(found)


def test_nothing_replaced(users):
    found = check(users, "plain")
    assert (found.status, found.parity, found.speed) == (1, (), None)
    assert "holds no transformer blocks that maefast knows" in text(found)
    assert "Nothing would be replaced" in text(found)


def test_bfloat16(users, always, quick):
    found = check(users, dtype="bfloat16")
    assert found.status == 0
    outputs = found.parity[0]
    assert 1e-5 < outputs.value <= outputs.allowed  # from float32


def test_evaluating(users, always, quick):
    found = check(users, training=False)
    assert [d.what for d in found.parity] == ["outputs", "random numbers"]
    assert found.status == 0
    assert "forward, ms" in text(found)
    assert "a forward as it is takes" in text(found)


def test_frozen(users, always, quick):
    found = check(users, "frozen")
    assert [d.what for d in found.parity] == ["outputs", "random numbers"]
    assert found.status == 0


@pytest.mark.parametrize("batch", ["keywords", "images"])
def test_a_batch_of_the_users(users, quick, batch):
    found = check(users, batch=f"{users}:{batch}")
    assert found.given.startswith("imgs [3, 3, 32, 32]")
    assert found.given.endswith(f"from {users}:{batch}")
    assert found.equal


def test_videos(users, always, quick):
    found = check(users, "video")
    assert found.given == "x [2, 3, 4, 16, 16], mask [2, 32] bool; a guess from the model"
    assert found.report.families == ["VideoMAE"]
    assert [d.what for d in found.parity][2:] == ["gradients of all outputs"]
    assert found.status == 0


def test_no_loss_and_nested_outputs(users, always, quick):
    found = check(users, "Nested")
    assert [d.what for d in found.parity][2:] == ["gradients of all outputs"]
    assert found.status == 0
    assert found.report.replaced


def test_a_model_that_counts_its_calls(users, always, quick):
    """Each call that is compared finds the buffers as they were."""
    assert check(users, "Averages").status == 0


# --- it can fail --------------------------------------------------------------------------------------------


def test_another_result(users, always, monkeypatch):
    def change(model):
        with torch.no_grad():
            model.decoder_pred.weight *= 1.01

    changed(monkeypatch, change)
    found = check(users)
    assert (found.status, found.speed) == (4, None)
    assert found.verdict.startswith("Accelerated, the model computes something else: outputs (output ")
    assert "NOT EQUAL" in text(found)


def test_another_gradient(users, always, monkeypatch):
    changed(monkeypatch, lambda model: model.blocks[1].attn.qkv.weight.register_hook(lambda g: 1.01 * g))
    found = check(users)
    assert found.status == 4
    assert [d.equal for d in found.parity] == [True, True, False, False]
    assert found.parity[2].where == "blocks.1.attn.qkv.weight"
    assert found.parity[2].value == pytest.approx(0.01, rel=0.05)


def test_no_gradient(users, always, monkeypatch):
    def change(model):
        model.cls_token.requires_grad = False

    changed(monkeypatch, change)
    found = check(users)
    assert found.status == 4
    assert found.parity[2].where == "cls_token has one in only one of the two"


def test_other_random_numbers(users, always, monkeypatch):
    changed(monkeypatch, draw)
    found = check(users)
    assert found.status == 4
    assert [d.what for d in found.parity if not d.equal] == ["random numbers"]


def test_another_result_in_bfloat16(users, always, monkeypatch):
    def change(model):
        with torch.no_grad():
            model.decoder_pred.weight *= 1.1

    changed(monkeypatch, change)
    assert check(users, dtype="bfloat16").status == 4


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Restless", {}, "computes something else at every call"),
        ("Text", {}, "returns a str without a floating tensor"),
        ("same", {}, "gives the same model twice"),
        ("linear", {}, "cannot be guessed"),
        ("Leaves", {}, "the model raised SystemExit: 0"),
        ("mae", {"batch": "a_users_models:not_numbers"}, r"the model's outputs .output 0. are NaN or infinite"),
        ("mae", {"shapes": ["2x3x16x16"], "batch_size": None}, "the model raised AssertionError"),
        ("mae", {"dtype": "float16"}, "choose a dtype from float32, bfloat16"),
        ("mae", {"device": "tpu"}, "a device from auto, cpu, cuda"),
        ("mae", {"seconds": 0}, "--seconds must be above 0"),
        ("mae", {"batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_what_cannot_be_checked(users, always, quick, name, options, says):
    with pytest.raises(ConfigError, match=says):
        check(users, name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_device(users):
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        check(users, device="cuda")


# --- the command --------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli.app, ["accelerate-check", *map(str, arguments)])


SHORT = ("--batch-size", 2, "--device", "cpu", "--seconds", 0.01)


def test_the_command(users, tmp_path, always, quick):
    result = command("a_users_models:mae", *SHORT, "--json", "found.json")
    assert result.exit_code == 0, result.output
    assert "MaskedAutoencoderViT of a_users_models:mae, training, float32: imgs [2, 3, 32, 32]" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["format"], found["status"], found["families"]) == (1, 0, ["facebookresearch/mae"])
    block = {"where": "blocks.0", "what": "fused attention, residual + norm, bias + GELU", "runs": "ran fast 2 times"}
    assert block in found["replaced"]
    assert [part["equal"] for part in found["parity"]] == [True] * 4
    assert found["speed"]["ratio"] > 0
    assert len(found["speed"]["seconds"]) == 2


def test_the_command_with_nothing_to_replace(users, tmp_path):
    result = command(f"{users}:plain", "--input", "1x3x8x8", "--eval", "--json", "found.json")
    assert result.exit_code == 1, result.output
    assert "nothing is replaced" in result.output
    assert json.loads((tmp_path / "found.json").read_text())["speed"] is None


def test_the_command_where_the_two_differ(users, tmp_path, always, monkeypatch):
    changed(monkeypatch, draw)
    result = command(f"{users}:mae", *SHORT, "--json", "found.json")
    assert result.exit_code == 4, result.output
    parity = json.loads((tmp_path / "found.json").read_text())["parity"]
    assert next(part for part in parity if part["what"] == "random numbers")["value"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere:build",), "there is no module 'nowhere'"),
        (("a_users_models:raises",), "raised ValueError: no such checkpoint"),
        (("a_users_models:leaves",), "raised SystemExit"),
        (("a_users_models:mae", "--input", "99999999999x3x32x32"), "an input of 99999999999x3x32x32 cannot be made"),
        (("a_users_models:mae", "--json", "."), "--json . is a folder; give the name of a file"),
        (("a_users_models:mae", "--json", "nowhere/found.json"), "--json nowhere/found.json: there is no such folder"),
        (("a_users_models:mae", "--batch", "a_users_models:nothing"), "has no 'nothing'"),
    ],
)
def test_errors_are_one_message(users, arguments, says):
    result = command(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert says in result.output
    assert "Traceback" not in result.output


def test_the_table_is_shown_before_a_file_fails(users, tmp_path, monkeypatch):
    monkeypatch.setattr("maefast.train.parse.must_be_file", lambda *given: None)
    result = command(f"{users}:plain", "--input", "1x3x8x8", "--eval", "--json", tmp_path)
    assert result.exit_code == 1
    assert "Nothing would be replaced" in result.output
    assert f"error: {tmp_path}: Is a directory" in result.output


def test_wrong_usage():
    assert command().exit_code == 2
    assert command("a:b", "--dtype", "float16").exit_code == 2
    assert command("a:b", "--device", "tpu").exit_code == 2


def test_python_dash_m():
    call = subprocess.run([sys.executable, "-m", "maefast", "--version"], capture_output=True, text=True)
    assert call.stdout.strip() == f"maefast {maefast.__version__}", call.stderr


def test_infinity_is_no_json():
    from maefast.check.found import _number

    assert [_number(value) for value in (1.5, math.inf, math.nan)] == [1.5, None, None]


def test_long_names_squeeze_no_figure():
    from maefast.check import Difference, Speed

    differs = Difference("gradients of all outputs", 1e-6, "decoder.decoder_layers.0.intermediate.dense.weight", 1e-3)
    report = integrations.Report("Net")
    report.add("", "forward", True, "fused")
    times = Speed((0.6947, 0.7517), 0.97, (0.94, 1.05), 3, (2**24, 2**23))
    found = Check("", "", "Net", "", "cpu", "float32", True, report, (differs,), times)
    stream = io.StringIO()
    found.show(Console(file=stream, width=100))
    for part in ("as it is", "accelerated", "694.70", "751.70", "16.0", "off by 1e-06"):
        assert part in stream.getvalue()
