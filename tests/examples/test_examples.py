"""Every example runs as its reader would run it, at its smallest, and says what it should."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytest.importorskip("skimage")
pytest.importorskip("transformers")
SMALL = ("--batch-size", "4", "--size", "32")


def run(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What the example prints."""
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(text: str) -> dict[int, str]:
    found = {int(step): loss for step, loss in re.findall(r"^step (\d+) loss (\S+)$", text, re.MULTILINE)}
    assert all(math.isfinite(float(loss)) for loss in found.values()), text
    return found


def assert_reported(text: str) -> None:
    assert text.count("maefast.accelerate:") == 1, text
    assert "fused attention" in text
    assert "agree" in text


def assert_loads(folder: Path) -> None:
    """The files are those of plain transformers, and know nothing of us."""
    from transformers import ViTMAEForPreTraining

    assert type(ViTMAEForPreTraining.from_pretrained(folder)) is ViTMAEForPreTraining
    assert all(b"maefast" not in file.read_bytes() for file in folder.iterdir() if file.is_file())


def test_plain_loop(tmp_path):
    text = run("plain_loop.py", "--bf16", "--steps", "3", *SMALL, "--checkpoint", str(tmp_path / "at.pt"))
    assert_reported(text)
    assert list(losses(text)) == [1, 2, 3]
    assert (tmp_path / "at.pt").is_file()


def test_plain_loop_resumes(tmp_path, monkeypatch, capsys):
    """Two steps, and two more from the checkpoint, are the four of one run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    curves = []
    for arguments in (("--steps", "4"), ("--steps", "2"), ("--steps", "4", "--resume")):
        monkeypatch.setattr(sys, "argv", ["plain_loop.py", *arguments, *SMALL, "--checkpoint", str(tmp_path / "at.pt")])
        runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")
        curves.append(losses(capsys.readouterr().out))
    whole, first, rest = curves
    assert list(first) == [1, 2]
    assert list(rest) == [3, 4]
    assert {**first, **rest} == whole


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    text = run("lightning_loop.py", "--steps", "3", *SMALL, "--checkpoint", str(tmp_path / "at.ckpt"))
    assert_reported(text)
    assert list(losses(text)) == [1, 2, 3]
    assert "the model without maefast takes its weights" in text


def test_hf_trainer(tmp_path):
    text = run("hf_trainer.py", "--steps", "3", *SMALL, "--recompute", "--output-dir", str(tmp_path))
    assert_reported(text)
    curve = [float(loss) for loss in re.findall(r"'loss': '?([^',]+)", text)]
    assert len(curve) == 3
    assert all(map(math.isfinite, curve))
    ours, plain = map(float, re.search(r"accelerated (\S+), as saved and loaded (\S+)", text).groups())
    assert ours == pytest.approx(plain, rel=1e-5)
    assert_loads(tmp_path)


def test_accelerate_fsdp(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    text = run(
        "accelerate_fsdp.py",
        *("--steps", "3", *SMALL, "--mixed-precision", "bf16", "--output-dir", str(tmp_path)),
        launcher=torchrun,
    )
    assert_reported(text)
    assert list(losses(text)) == [1, 2, 3]
    processes, sharded = map(int, re.search(r"(\d+) processes, (\d+) sharded parameters", text).groups())
    assert processes == 2
    assert sharded > 50
    assert_loads(tmp_path)


def test_fused_ops():
    text = run("fused_ops.py", "--bf16", "--steps", "12", "--batch-size", "4")
    curve = list(losses(text).values())
    assert len(curve) == 12
    assert float(curve[-1]) < 0.9 * float(curve[0])


def test_none_is_forgotten():
    """Every file is run here (demo.py in tests/train) and listed in the README of the examples."""
    names = {file.name for file in EXAMPLES.glob("*.py")}
    here = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert names == here | {"demo.py", "toy.py"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in readme for name in names)
