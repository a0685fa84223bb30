"""The layout for Hugging Face's `kernels` (csrc/build/kernel_package.py): loads without maefast, and computes right."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from maefast import _native

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "csrc/build/kernel_package.py"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
    pytest.mark.skipif(not _native.has_cpu_ops, reason="installed without native libraries"),
]
# The libraries that are installed here register themselves in this namespace; the command builds others.
ID = "maefast"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("maefast_kernel_package", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variant(script, tmp_path_factory) -> Path:
    libraries = _native.find_library("cpu").parent
    return script.write(tmp_path_factory.mktemp("kernel"), ID, libraries, {"type": "cpu"})


# As `kernels` imports a variant; nothing else named maefast may be found.
ALONE = """
import importlib.abc, importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "maefast" and path is None:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
LOAD = """
spec = importlib.util.spec_from_file_location({name!r}, {path!r})
kernel = importlib.util.module_from_spec(spec)
sys.modules[{name!r}] = kernel
spec.loader.exec_module(kernel)
"""
COMPUTE = """
import torch
for part in (kernel.ops, kernel.masking):
    assert part.__file__.startswith({folder!r}), part.__file__
plan = kernel.masking.random(4, 33, 0.75, generator=torch.Generator().manual_seed(0))
x = torch.randn(4, 33, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
pred = torch.randn(plan.total_masked, 48, dtype=torch.float64, requires_grad=True)
images = torch.randn(4, 3, 12, 44, dtype=torch.float64)
found = {{}}
for backend in ("cpu", "reference"):
    rows = kernel.gather_tokens(x, plan, backend=backend)
    loss = kernel.patch_loss(pred, images, plan, patch_size=4, backend=backend)
    found[backend] = (rows, loss, *torch.autograd.grad(loss + rows.square().sum(), (x, pred)))
for a, b in zip(found["cpu"], found["reference"]):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
print(found["cpu"][0].shape[1], sorted(set(kernel.__all__) - set(dir(kernel))))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_variant_loads_alone_and_computes_right(variant):
    code = ALONE + LOAD.format(name=ID, path=str(variant / "__init__.py")) + COMPUTE.format(folder=str(variant))
    assert python(code) == "8 []"


def test_folder_for_older_versions_gives_the_same(variant):
    code = ALONE + LOAD.format(name="other", path=str(variant / "maefast/__init__.py"))
    code += f"first = sys.modules[{ID!r}]\nassert all(getattr(kernel, n) is getattr(first, n) for n in first.__all__)\n"
    assert python(code + "print(len(kernel.__all__) > 30)") == "True"


def test_beside_maefast_itself(script, tmp_path):
    """Ops are registered under the kernel's own name, or the second registration would fail."""
    other = script.write(tmp_path, "_maefast_other", _native.find_library("cpu").parent, {"type": "cpu"})
    code = "import os, sys, importlib.util\nos.environ['MAEFAST_DISABLE_NATIVE'] = '1'\nimport maefast, torch\n"
    code += LOAD.format(name="_maefast_other", path=str(other / "__init__.py"))
    code += "plan = kernel.masking.random(2, 9, 0.5)\nprint(kernel.gather_tokens(torch.ones(2, 9, 3), plan).shape[1])\n"
    assert python(code) == "4"


def test_layout_and_metadata(variant):
    assert variant.name == f"torch-stable-abi210-cpu-{platform.machine()}-linux"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert (metadata["name"], metadata["id"], metadata["backend"]) == ("maefast", ID, {"type": "cpu"})
    found = {str(path.relative_to(variant)) for path in variant.rglob("*") if path.is_file()} - {"metadata.json"}
    assert set(metadata["digest"]["files"]) == {name for name in found if "__pycache__" not in name}
    for name in ("ops/mask.py", "_cpu.so", "LICENSE"):
        digest = hashlib.sha256((variant / name).read_bytes()).digest()
        assert metadata["digest"]["files"][name] == base64.b64encode(digest).decode()
    for path in variant.rglob("*.py"):
        assert "from maefast" not in path.read_text()


def test_huggingface_kernels_loads_it(variant):
    try:
        importlib.metadata.distribution("kernels")  # a folder of this name is not it
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs `pip install kernels`")
    code = f"{ALONE}import kernels, pathlib\n"
    code += f"kernel = kernels.get_local_kernel(pathlib.Path({str(variant.parents[1])!r}))\n"
    assert python(code + COMPUTE.format(folder=str(variant))) == "8 []"


def test_cuda_variant_names_its_compiler_and_architectures(script, tmp_path):
    for name in script.LIBRARIES:
        (tmp_path / name).write_bytes(b"")
    backend = {
        "type": "cuda",
        "version": "13.0.88",
        "archs": script._archs(["80-real", "90a-real", "100-real", "100-virtual"]),
    }
    made = script.write(tmp_path, "_maefast_0123456", tmp_path, backend)
    assert made.name.startswith("torch-stable-abi210-cu130-")
    metadata = json.loads((made / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0a", "10.0+PTX"]}
    assert 'NAMESPACE = "_maefast_0123456"' in (made / "ops/_registry.py").read_text()
    assert "_cuda.so" in metadata["digest"]["files"]


@pytest.mark.parametrize(
    ("line", "depth", "expected"),
    [
        ("from maefast import _native", 1, "from .. import _native"),
        ("    from maefast.ops.mask import TokenMask", 1, "    from ..ops.mask import TokenMask"),
        ("from maefast.ops import x", 0, "from .ops import x"),
        ("from maefastest import x", 1, "from maefastest import x"),
    ],
)
def test_imports_become_relative(script, line, depth, expected):
    assert script.relative(line, depth) == expected


def test_an_import_that_cannot_be_relative_is_refused(script):
    with pytest.raises(ValueError, match="import maefast"):
        script.relative("import maefast.ops as ops", 1)
