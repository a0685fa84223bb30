"""The command line: help, options into a configuration, one-line errors, the commands end to end."""

# ruff: noqa: E402 (skipped before the imports that need the extra)

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

for package in ("typer", "accelerate", "PIL", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(package, reason="the command line's tests need maefast[train]")

from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

import maefast
from maefast import cli
from maefast.train import PretrainConfig, loop
from maefast.train.config import default_workers
from maefast.train.options import HELP
from tests.train.common import TINY, rows, write_photos

MODEL = [f"--model-arg={name}={value}" for name, value in TINY.items()]
SMALL = ["--model", "mae", *MODEL, "--img-size", "16", "--patch-size", "4", "--workers", "0", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(photos, run) of `maefast pretrain`."""
    photos = write_photos(tmp_path_factory.mktemp("photos"))
    out = tmp_path_factory.mktemp("run") / "out"
    result = run("pretrain", "--data", photos, *SMALL, "--steps", 3, "--batch-size", 4, "-o", out, "--save-every", 2)
    assert result.exit_code == 0, result.output
    return photos, out


def test_help_and_version():
    assert run("--version").output.strip() == f"maefast {maefast.__version__}"
    text = run("--help").output
    for command in ("pretrain", "reconstruct", "probe", "finetune", "export", "accelerate-check", "doctor", "bench"):
        assert command in text


def test_every_option_has_help_and_the_default_of_the_configuration():
    import inspect

    parameters = inspect.signature(cli.pretrain).parameters
    options = {name for panel in HELP.values() for name in panel}
    assert options == set(parameters) - {"ctx"}
    fields = PretrainConfig.__dataclass_fields__
    assert options - {"config", "demo", "model_arg"} == set(fields) - {"model_args"}
    plain = PretrainConfig()
    for name, parameter in parameters.items():
        if name in fields and name != "workers":
            default = getattr(parameter.default, "value", parameter.default)
            assert default == getattr(plain, name), name
    assert plain.workers == default_workers()


def test_options_reach_the_configuration(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(loop, "pretrain", seen.append)
    (tmp_path / "base.yaml").write_text("data: photos\nbatch_size: 8\nsteps: 100\nlr: 0.1\nmodel_args: {depth: 2}\n")
    result = run(
        "pretrain", "--config", tmp_path / "base.yaml", "--batch-size", 16, "--epochs", 5, "--model-arg", "mlp_ratio=2",
        "--img-size", "32x64", "--no-norm-pix", "--amp", "bf16", "--crop-scale", 0.5, 0.9, "--blr", 1e-3, "--skip-bad",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen == [
        PretrainConfig(
            data="photos", batch_size=16, epochs=5.0, steps=None, lr=None, blr=1e-3, img_size=[32, 64], norm_pix=False,
            amp="bf16", crop_scale=(0.5, 0.9), skip_bad=True, model_args={"depth": 2, "mlp_ratio": 2},
        )
    ]  # fmt: skip


def test_pretrain_leaves_a_run_and_resumes(trained):
    _, out = trained
    assert len(rows(out)) == 3
    result = run("pretrain", "--config", out / "config.yaml", "--steps", 5)
    assert result.exit_code == 0, result.output
    assert "resuming from" in result.output
    assert len(rows(out)) == 5


def test_reconstruct_and_export(trained, tmp_path):
    photos, out = trained
    images = sorted(photos.rglob("*.png"))[:2]
    result = run("reconstruct", out, *images, "-o", tmp_path / "picture.png", "--mask-ratio", 0.5, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.png").stat().st_size > 1000
    for name, format in (("a.safetensors", "timm"), ("folder", "hf"), ("b.safetensors", "hf4"), ("c.pth", "mae")):
        result = run("export", out, tmp_path / name, "--format", format)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).exists()


def test_pictures_have_the_format_of_their_name(trained, tmp_path):
    photos, out = trained
    image = sorted(photos.rglob("*.png"))[0]
    for name, format in (
        ("a.jpg", "JPEG"),
        ("b.JPEG", "JPEG"),
        ("c.webp", "WEBP"),
        ("d.png", "PNG"),
        ("e.tif", "TIFF"),
    ):
        result = run("reconstruct", out, image, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / name) as picture:
            assert picture.format == format
    result = run("reconstruct", out, image, "-o", tmp_path / "raw.png", "--picture", "raw")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "raw.png").read_bytes() != (tmp_path / "d.png").read_bytes()


def test_a_masked_convnet_end_to_end(trained, tmp_path):
    photos, out = trained[0], tmp_path / "out"
    net = ["--model-arg=depths=[1,1,1,1]", "--model-arg=widths=[8,8,16,16]", "--model-arg=decoder_embed_dim=16"]
    options = ["--steps", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--img-size", "64", "-o", out]
    result = run("pretrain", "--data", photos, "--model", "fcmae", *net, *options)
    assert result.exit_code == 0, result.output
    result = run("reconstruct", out, sorted(photos.rglob("*.png"))[0], "-o", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    for format in ("timm", "official", "mae"):
        result = run("export", out, tmp_path / f"{format}.safetensors", "--format", format)
        assert result.exit_code == 0, result.output
        assert f"({format} names)" in result.output
    result = run("export", out, tmp_path / "hf", "--format", "hf")
    assert result.exit_code == 1
    assert result.output.startswith("error: --format hf is for a ViT")


def test_help_names_every_family():
    text = " ".join(run("pretrain", "--help").output.replace("│", " ").split())
    for name in ("mae_base", "spark_resnet50", "spark_convnext_{", "fcmae_convnextv2_{", "sync_bn=true"):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "--data is missing"),
        (["pretrain", "--data", "/nowhere"], "no such folder"),
        (["pretrain", "--data", f"{__file__[:-4]}*.py"], "patterns are for tars and tables"),
        (["pretrain", "--data", "x", "--steps", 3, "--epochs", 2], "give --steps or --epochs, not both"),
        (["pretrain", "--data", "x", "--lr", 3, "--blr", 2], "give --lr or --blr, not both"),
        (["pretrain", "--data", "x", "--init-ema"], "--init-ema goes with --init-from"),
        (["pretrain", "--data", "x", "--init-exact"], "--init-exact goes with --init-from"),
        (["pretrain", "--data", "x", "--img-size", "big"], "--img-size wants"),
        (["pretrain", "--data", "x", "--model-arg", "depth"], "NAME=VALUE"),
        (["pretrain", "--config", "/nowhere.yaml"], "No such file"),
        (
            ["pretrain", "--data", "skimage", "--model-arg", "dept=3"],
            "takes no dept; its arguments (--model-arg NAM",
        ),
        (
            ["pretrain", "--recipe", "dmae", "--data", "skimage", "--model-arg", "teacher=nothere.pth"],
            "teacher 'nothere.pth': there is no such file",
        ),
        (
            ["pretrain", "--recipe", "mr_mae", "--data", "skimage", "--model-arg", "teacher=nothere.safetensors"],
            "teacher 'nothere.safetensors': there is no such file",  # and no network is asked
        ),
        (
            ["pretrain", "--recipe", "maskalign", "--data", "skimage", "--model-arg", "teacher=./nowhere"],
            "teacher './nowhere' cannot be read: ",
        ),
        (
            ["pretrain", "--recipe", "q_former_ae", "--data", "skimage", "--model-arg", "backbone=nowhere"],
            "backbone 'nowhere' cannot be read: ",
        ),
        (["pretrain", "--data", "skimage", "--model", "spark_resnet50", "--no-norm-pix"], "always normalised"),
        (["pretrain", "--data", "skimage", "--model", "spark_resnet50", "--patch-size", 16], "has no --patch-size"),
        (["reconstruct", "/nowhere", "a.png"], "no such checkpoint"),
        (["export", "/nowhere", "a.safetensors"], "no such checkpoint"),
        (["reconstruct", "/nowhere", "a.png", "-o", "a.xyz"], "give a name that ends in .png, .jpg"),
        (["reconstruct", "/nowhere", "a.png", "-o", "/"], "give a name that ends in"),
        (["reconstruct", "/nowhere", "a.png", "--seed", -1], "--seed must lie in 0 … 2**63-1, not -1"),
        (["reconstruct", "/nowhere", "a.png", "--seed", 2**63], "--seed must lie in 0 … 2**63-1"),
        (["export", "/nowhere", "a.safetensors", "--img-size", "x"], "--img-size wants"),
        (["pretrain", "--data", "x", "-o", "/dev/null"], "--output-dir /dev/null: /dev/null is not a folder"),
        (["bench", "nothing"], "no benchmark 'nothing'"),
    ],
)
def test_errors_are_one_message_without_a_traceback(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert "Traceback" not in result.output


def test_files_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").touch()
    result = run("export", trained[1], tmp_path / "file" / "a.safetensors", "--format", "timm")
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {tmp_path / 'file'}")


@contextmanager
def full_disk(room: int):
    """No file grows beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "folder"])
def test_a_full_disk_for_export(trained, tmp_path, name):
    with full_disk(1000):
        result = run("export", trained[1], tmp_path / name, "--format", "hf" if name == "folder" else "timm")
    written = tmp_path / name / "model.safetensors" if name == "folder" else tmp_path / name
    assert (result.exit_code, result.output) == (1, f"error: {written}: File too large\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_for_pictures_and_configurations(trained, tmp_path):
    photos, out = trained
    with full_disk(1000):
        result = run("reconstruct", out, photos, "-o", tmp_path / "picture.png")
    assert (result.exit_code, result.output) == (1, f"error: {tmp_path / 'picture.png'}: File too large\n")
    with full_disk(100):
        result = run("pretrain", "--data", photos, *SMALL, "--steps", 3, "-o", tmp_path)
    assert result.exit_code == 1
    assert result.output.endswith(f"error: {tmp_path / 'config.yaml'}: File too large\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_errors_that_name_no_file(error, capsys):
    def command():
        raise error

    with pytest.raises(cli.typer.Exit):
        cli._run(command)
    assert capsys.readouterr().err.strip() == f"error: {error.strerror if isinstance(error, OSError) else error}"


def test_what_help_says_of_steps_and_resuming():
    text = {name: " ".join(run(name, "--help").output.replace("│", " ").split()) for name in
            ("pretrain", "profile", "data-speed")}  # fmt: skip
    assert "needs --steps" in text["pretrain"]
    assert "needs --steps" not in text["profile"] + text["data-speed"]
    assert "without an index" in text["profile"]
    assert "refused where OUTPUT holds one" in text["pretrain"]


def test_an_unreadable_image_for_reconstruct(trained, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"broken")
    result = run("reconstruct", trained[1], tmp_path / "bad.png")
    assert result.exit_code == 1
    assert "bad.png" in result.output
    assert "(leave it out)" in result.output
    assert "--skip-bad" not in result.output


def test_names_that_are_no_text_end_no_command(monkeypatch):
    """Where stdout takes text only."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(cli, "app", lambda: cli.typer.echo(b"a\xff.png".decode(errors="surrogateescape")))
    cli.main()
    assert stdout.buffer.getvalue() == b"a\\udcff.png\n"


def test_wrong_usage_is_status_2():
    assert run("pretrain", "--no-such-option").exit_code == 2
    assert run("pretrain", "--amp", "fp8").exit_code == 2
    assert run("export", "x", "y", "--format", "onnx").exit_code == 2


@pytest.mark.parametrize("package", ["accelerate", "PIL"])
def test_missing_extras_are_named(package, tmp_path):
    """In a process of its own: modules that are imported anew would stay in their packages, beside the old ones."""
    code = f"import sys; sys.modules[{package!r}] = None; from maefast.cli import main; main()"
    call = lambda *args: subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)  # noqa: E731
    result = call("pretrain", "--data", str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "maefast[train]" in result.stdout + result.stderr
    assert call("--help").returncode == 0


def test_doctor():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["versions"]["maefast"] == maefast.__version__
    assert run("doctor").exit_code == 0


def test_bench_lists_and_passes_on(monkeypatch):
    """The rest is in tests/bench/test_menu.py."""
    from maefast.bench import menu

    assert "other people's models" in run("bench").output
    assert run("bench", "nothing").exit_code == 1
    runs = []
    monkeypatch.setattr(menu, "_process", lambda *what: runs.append(what) or 4)
    assert run("bench", "step", "--help").exit_code == 4  # of the benchmark, not of this command
    assert run("bench", "compare", "a", "--all").exit_code == 4
    assert runs == [("step", ["--help"]), ("compare", ["a", "--all"])]
