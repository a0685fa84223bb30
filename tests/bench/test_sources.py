"""What code a module reaches, read from its syntax, against what runs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import maefast
from maefast.bench import freshness, menu, sources
from maefast.bench.environment import CHECKOUT

ROOT = Path(__file__).resolve().parents[2]
PYTHON = '"""About."""\nX = 1\n\n\ndef f(a, b=2):\n    """What it does."""\n    return f"{a} {b}"\n'


@pytest.fixture(scope="module")
def tree():
    assert CHECKOUT == ROOT, "the tests are those of another checkout"
    return sources.checkout(ROOT)


@pytest.mark.parametrize(
    ("suffix", "text", "same", "other"),
    [
        ("py", PYTHON, '# a note\nX=1\ndef f(a,\n      b=2):\n  return f"{a} {b}"\n', PYTHON.replace("b=2", "b=3")),
        ("py", PYTHON, PYTHON.replace("About", "Else").replace("What it does", "And"), PYTHON.replace("X", "Y")),
        ("py", 'x = "a # b"\n', 'x = ("a "\n     "# b")\n', 'x = "a # c"\n'),
        ("cpp", "int f() { return 0; } // so\n", "int  f( )\n{ /* no\n */ return 0; }", "int f() { return 1; }"),
        ("h", 'auto x = "a // b";\n', 'auto x =\n  "a // b";', 'auto x = "a // c";'),
        ("h", "#define A(x) \\\n  f(x)\n", "#define A(x) f(x)\n", "#define A(x) g(x)\n"),
        ("cmake", "set(x -O3) # why\n", "set(x\n  -O3)\n", "set(x -O2)\n"),
    ],
)  # fmt: skip
def test_layout_and_words_change_no_digest(suffix, text, same, other):
    assert sources.canonical(suffix, text) == sources.canonical(suffix, same)
    assert sources.canonical(suffix, text) != sources.canonical(suffix, other)


SMALL = {
    "maefast/__init__.py": "from . import ops\n",
    "maefast/ops/__init__.py": "from maefast.ops.mask import mask\nfrom maefast.ops.loss import loss\n",
    "maefast/ops/mask.py": "from maefast.ops import _checks\n",
    "maefast/ops/loss.py": "from maefast.ops.mask import Plan\n",
    "maefast/ops/_checks.py": "",
    "maefast/nn/__init__.py": "from maefast.nn.norm import Norm\ndef make():\n    from maefast.nn.block import Block\n",
    "maefast/nn/norm.py": "import maefast\n\n\ndef f():\n    return maefast.ops.mask(1)\n",
    "maefast/nn/block.py": "from maefast import ops as o\n\n\ndef f():\n    return o.loss(1)\n",
    "maefast/nn/relative.py": "from .norm import Norm\n",
    "maefast/nn/maker.py": "from maefast import nn\n\n\ndef f():\n    return nn.make()\n",
    "kernels/mask.py": "from maefast.kernels import _common\n",
    "kernels/_common.py": "",
    "csrc/build/cpu.cmake": "",
    "csrc/cpu/mask.cpp": '#include "cpu/ops.h"\n#include "cpu/shared.h"\n',
    "csrc/cpu/mask_kernel.cpp": "",
    "csrc/cpu/maskless.cpp": "",
    "csrc/cpu/shared.h": '#include "plan.h"\n',
    "csrc/cpu/shared.cpp": "",
    "csrc/cpu/ops.h": "",
    "csrc/plan.h": "",
    "csrc/cuda/mask.cu": '#include "common.cuh"\n',
    "csrc/cuda/common.cuh": "",
    "bench/peers/plain.py": "from maefast.nn import Norm\nfrom maefast.bench.peers import more\n",
    "bench/peers/more.py": "",
}  # fmt: skip
CPU = {"csrc/build/cpu.cmake", "csrc/cpu/mask.cpp", "csrc/cpu/mask_kernel.cpp", "csrc/cpu/shared.h", "csrc/plan.h"}
MASK = {"maefast/ops/mask.py", "maefast/ops/_checks.py", *CPU, "csrc/cpu/shared.cpp"}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("maefast/ops/mask.py", MASK),
        ("maefast/nn/norm.py", {"maefast/nn/norm.py", *MASK}),
        ("maefast/nn/relative.py", {"maefast/nn/relative.py", "maefast/nn/norm.py", *MASK}),
        ("maefast/nn/block.py", {"maefast/nn/block.py", "maefast/ops/loss.py", *MASK}),
        ("bench/peers/plain.py", {"bench/peers/plain.py", "bench/peers/more.py", "csrc/build/cpu.cmake"}),
    ],
)
def test_names_are_followed_to_the_module_that_defines_them(start, expected):
    assert sources.reached(SMALL, [start], "cpu") == expected


def test_a_package_that_defines_a_name_counts_itself():
    found = sources.reached(SMALL, ["maefast/nn/maker.py"], "cpu")
    assert {"maefast/nn/__init__.py", "maefast/nn/block.py", "maefast/nn/norm.py"} <= found


def test_a_gpu_has_other_kernels():
    found = sources.reached(SMALL, ["maefast/ops/mask.py"], "cuda")
    assert {"kernels/mask.py", "kernels/_common.py", "csrc/cuda/mask.cu", "csrc/cuda/common.cuh"} <= found
    assert not any(path.startswith("csrc/cpu/") for path in found)


def test_a_missing_file_gives_no_digest():
    assert sources.digest(SMALL, ["maefast/ops/mask.py"]) is not None
    assert sources.digest(SMALL, ["maefast/ops/gone.py"]) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_target_of_this_checkout_has_sources(device):
    targets = freshness.all_targets()
    assert sorted(freshness.digests(targets, device)) == targets
    from maefast.bench.micro import suite

    assert {f"ops/{family}" for family in suite.FAMILIES} <= set(targets)
    assert {f"dropin/{family}" for family in menu.FAMILIES} <= set(targets)
    beside = {path.stem for path in (ROOT / "bench/peers/recipes").glob("*.py")}
    assert {f"recipes/{spec.name}" for spec in maefast.recipes.list() if spec.name in beside} <= set(targets)


def test_a_kernel_concerns_those_that_run_it(tree):
    def digests(tree):
        return {
            name: sources.digest(tree, where.follow, where.alone, "cpu", where.without)
            for name in freshness.all_targets()
            for where in [freshness.roots(name)]
        }

    def moved(path):
        after = digests({**tree, path: tree[path] + "\nint another;\n"})
        return {name for name in before if before[name] != after[name]}

    before = digests(tree)
    convnets = moved("csrc/cpu/sparse_conv_kernel.cpp")
    assert {"ops/sparse_conv", "step/spark", "step/fcmae", "dropin/spark", "volumes", "recipes/spark3d"} <= convnets
    assert not {"ops/attention", "step/vit", "dropin/mae", "recipes/videomae", "block", "data"} & convnets
    tokens = moved("csrc/cpu/attention_kernel.cpp")
    assert {"ops/attention", "step/vit", "scaling", "dropin/hf_vitmae", "recipes/videomae", "block", "toys"} <= tokens
    assert not {"ops/norm", "dropin/fcmae", "volumes", "recipes/spark3d", "data"} & tokens
    cells = moved("csrc/cpu/cells_kernel.cpp")
    assert {"ops/cells", "step/fcmae", "dropin/spark", "volumes", "recipes/spark3d"} <= cells
    assert not {"ops/mask", "step/vit", "scaling", "recipes/videomae"} & cells
    assert {"ops/resize", "data"} <= moved("csrc/cpu/resize_kernel.cpp") <= {"ops/resize", "data"}


def _ran(step) -> set[str]:
    """The files of maefast that a call ran something of."""
    found: set[str] = set()

    def profile(frame, event, arg):
        found.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    paths = {Path(name).resolve() for name in found if name.endswith(".py")}
    inside = {path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT / "maefast")}
    return {path for path in inside if not path.startswith(freshness.OUTSIDE) and not path.endswith("__init__.py")}


def _model(name, size, **settings):
    model = maefast.models.create(name, img_size=size, **settings)
    return lambda: model(torch.randn(2, 3, size, size), mask_ratio=0.5)[0].backward()


def _accelerated():
    from maefast.bench.peers.public.mae import MaskedAutoencoderViT

    sizes = {"embed_dim": 384, "depth": 1, "num_heads": 6, "decoder_embed_dim": 384, "decoder_depth": 1}
    model = maefast.accelerate(MaskedAutoencoderViT(img_size=64, patch_size=8, decoder_num_heads=6, **sizes))
    return lambda: model(torch.randn(8, 3, 64, 64))[0].backward()  # large enough for kernels


def _recipe():
    from maefast.bench.peers.recipes import graphmae

    recipe = maefast.recipes.create("graphmae", **getattr(graphmae, "ARGUMENTS", {}))
    return lambda: recipe(recipe.view(graphmae.batch(1), seed=1)).loss.backward()


@pytest.mark.parametrize(
    ("target", "make"),
    [
        ("step/vit", partial(_model, "mae_tiny", 32, patch_size=8, depth=1, decoder_depth=1)),
        ("step/fcmae", partial(_model, "fcmae_convnextv2_atto", 64)),
        ("dropin/mae", _accelerated),
        ("recipes/graphmae", _recipe),
    ],
)
def test_what_runs_is_reached(target, make, tree):
    where = freshness.roots(target)
    reached = sources.reached(tree, where.follow, "cpu", where.without) | set(where.alone)
    ran = _ran(make())
    assert len(ran) > 5
    assert not ran - reached
