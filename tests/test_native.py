"""Building, finding and loading the native libraries, and what happens where they are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import maefast
from maefast import _native

ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(not _native.has_cpu_ops, reason="installed without native libraries")
sources = pytest.mark.skipif(not (ROOT / "csrc/build").is_dir(), reason="needs the source tree")


def python(code: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, from a directory where no source tree can be picked up."""
    full = {k: v for k, v in os.environ.items() if not k.startswith("MAEFAST_")}
    full.update(env, OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=full, cwd="/", capture_output=True, text=True, check=check, timeout=300)


# --- loading ---------------------------------------------------------------------------------------------------


@native
def test_status_and_build_info():
    status = _native.status()
    assert (status["C"], status["cpu"], status["error"]) == (True, True, None)
    info = _native.C.build_info()
    assert info["version"] == maefast.__version__
    assert "plain" in info["cpu_isas"].split()
    assert all(info[key] for key in ("torch", "compiler", "kernel_flags"))
    assert status["cuda"] == (torch.version.cuda is not None and _native.find_library("cuda") is not None)
    assert _native.C.hardware_threads() >= _native.C.usable_cpus() >= 1


def test_status_is_a_copy():
    _native.status()["paths"]["cpu"] = "elsewhere"
    assert _native.status()["paths"].get("cpu") != "elsewhere"


GATHER = """
import torch, maefast
from maefast import _native
plan = maefast.masking.random(4, 33, 0.75, generator=torch.Generator().manual_seed(0))
x = torch.randn(4, 33, 17, generator=torch.Generator().manual_seed(1))
out = maefast.ops.gather_tokens(x, plan, backend={backend!r})
loss = maefast.ops.patch_loss(
    torch.randn(plan.total_masked, 48, generator=torch.Generator().manual_seed(2)),
    torch.randn(4, 3, 12, 44, generator=torch.Generator().manual_seed(3)), plan, patch_size=4, backend={backend!r})
print(_native.C and _native.C.current_isa(), float(out.double().sum()).hex(), float(loss).hex())
"""


@pytest.fixture(scope="module")
def reference() -> list[str]:
    return python(GATHER.format(backend="reference")).stdout.split()[1:]


PAGES = """
import torch, maefast
x = torch.randn({rows}, 1024, generator=torch.Generator().manual_seed(0))
out = maefast.ops.bias_gelu(x, torch.zeros(1024), backend="cpu")
found = ""
for line in open("/proc/self/smaps"):
    ends = line.split(" ")[0].split("-")
    if len(ends) == 2 and all(c in "0123456789abcdef" for c in ends[0] + ends[1]):
        inside = int(ends[0], 16) <= out.data_ptr() + out.nbytes // 2 < int(ends[1], 16)
    elif line.startswith("VmFlags:") and inside:
        found = line
print("hg" in found.split(), float(out.double().sum()).hex())
"""


@native
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages")
def test_large_results_ask_for_huge_pages():
    asked = python(PAGES.format(rows=20000), MAEFAST_HUGE_PAGES="on").stdout.split()
    without = python(PAGES.format(rows=20000), MAEFAST_HUGE_PAGES="off").stdout.split()
    assert (asked[0], without[0]) == ("True", "False")
    assert asked[1] == without[1]
    assert python(PAGES.format(rows=500), MAEFAST_HUGE_PAGES="on").stdout.split()[0] == "False"
    # A virtual machine whose host takes back what is free would have to fetch them again and again.
    balloons = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("*/features")
    gives_back = any(path.read_text()[5:6] == "1" for path in balloons)
    assert python(PAGES.format(rows=20000)).stdout.split()[0] == str(not gives_back)


ZEROS = """
import torch, maefast
from maefast.ops import _registry
g = torch.Generator().manual_seed(0)
plan = maefast.ops.token_mask(torch.rand(8, 1568, generator=g), keep=100)
rows = torch.randn(8 * 102, 768, generator=g)
run = _registry.raw("gather_tokens_backward", "cpu")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
found, shares = [], []
for _ in range(6):
    dirty = torch.full(({dirty} << 18,), float("nan"))  # MiB; may be the start of what comes next
    del dirty
    before = resident()
    found.append(run(rows, plan.slot, plan.cu_visible, 2, True, False))
    shares.append((resident() - before) / found[-1].nbytes)
x = torch.zeros(8, 1570, 768, requires_grad=True)
out = maefast.ops.gather_tokens(x, plan, prefix=2, backend="reference")
expected, = torch.autograd.grad(out.flatten(0, 1), x, rows)
print(max(shares), all(torch.equal(t, expected) for t in found))
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMALL_PAGES = os.sysconf("SC_PAGESIZE") == 4096 and not (THP.exists() and "[always]" in THP.read_text())
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # glibc gives nothing back to the system


@native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dirty", "options"), [(0, {}), (10, {}), (10, KEPT), (200, KEPT)])
def test_zeros_that_nobody_touched(dirty, options):
    """A large gradient of few rows: its zeros come from the system, unless the memory was in use, or its start was."""
    share, equal = python(ZEROS.format(dirty=dirty), **options).stdout.split()
    assert equal == "True"
    if not options and SMALL_PAGES:  # larger ones have a row each
        assert float(share) < 0.4


@native
@pytest.mark.parametrize("isa", _native.ISAS)
def test_every_instruction_set_computes_the_same(isa, reference):
    """MAEFAST_CPU_ISA lowers the choice; one that the CPU lacks gives the best there is."""
    best = _native.C.supported_isa()
    used, rows, loss = python(GATHER.format(backend="cpu"), MAEFAST_CPU_ISA=isa).stdout.split()
    assert used == min(isa, best, key=_native.ISAS.index)
    assert rows == reference[0]
    assert float.fromhex(loss) == pytest.approx(float.fromhex(reference[1]), rel=1e-6)


@native
def test_unknown_instruction_set_is_reported():
    result = python("import maefast; print(maefast._native.C.current_isa())", MAEFAST_CPU_ISA="avx9")
    assert "MAEFAST_CPU_ISA='avx9' is not one of plain, avx2, avx512, avx512bf16, amx" in result.stderr
    assert result.stdout.strip() == _native.C.supported_isa()


# --- missing or broken -------------------------------------------------------------------------------------------

MISSING = GATHER.format(backend=None) + "print(_native.status()['cpu'])"


def test_missing_library_warns_once_and_the_reference_serves(tmp_path, reference):
    result = python(MISSING, MAEFAST_NATIVE_DIR=str(tmp_path))
    assert result.stderr.count("NativeWarning: maefast runs without") == 1
    for part in ("slower", "_cpu.so is not installed", "To mend: reinstall maefast"):
        assert part in result.stderr
    *_, rows, loss, loaded = result.stdout.split()
    assert loaded == "False"
    assert [rows, loss] == reference


def test_broken_library_warns(tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"not a library" * 100)
    result = python(MISSING, MAEFAST_NATIVE_DIR=str(tmp_path))
    assert result.stderr.count("NativeWarning") == 1
    assert "invalid ELF header" in result.stderr


@native
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_library_of_another_torch_names_both_versions(tmp_path):
    """A change of torch that breaks the build shows as an undefined symbol."""
    source = tmp_path / "needs.cpp"
    source.write_text("extern int symbol_of_another_torch; int* address = &symbol_of_another_torch;")
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", tmp_path / "_cpu.so"], check=True)
    code = "import torch; torch.__version__ = '2.99.0'; import maefast; print(maefast._native.status()['cpu'])"
    result = python(code, MAEFAST_NATIVE_DIR=str(tmp_path))
    assert result.stdout.strip() == "False"
    assert f"built with torch {_native.C.build_info()['torch']}, and this is torch 2.99.0" in result.stderr
    assert "undefined symbol: symbol_of_another_torch" in result.stderr
    assert "--no-build-isolation" in result.stderr


def test_required_native_fails_the_import(tmp_path):
    result = python(MISSING, check=False, MAEFAST_NATIVE_DIR=str(tmp_path), MAEFAST_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "ImportError: maefast runs without" in result.stderr


def test_disabled_native_is_silent():
    result = python(MISSING, MAEFAST_DISABLE_NATIVE="1")
    assert "Warning" not in result.stderr
    assert result.stdout.split()[-1] == "False"


def test_forced_backend_does_not_fall_back():
    result = python(GATHER.format(backend="cpu"), check=False, MAEFAST_DISABLE_NATIVE="1")
    assert result.returncode != 0
    assert "MAEFAST_DISABLE_NATIVE" in result.stderr


# --- one build for every torch and Python -------------------------------------------------------------------------


def undefined(library: Path) -> set[str]:
    """What a library takes from others; not the weak symbols, which may be missing."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "U"}


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_of_torch_only_the_stable_interface_of_2_10_is_used(name):
    """Its C functions, none of which came later: the library loads beside every torch from 2.10 on."""
    library = _native.find_library(name)
    if library is None:
        pytest.skip(f"_{name}.so is not built")
    old, later = "", ""
    for header in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h"):
        block = 10
        for line in Path(torch.__file__).with_name("include").joinpath("torch/csrc", header).read_text().splitlines():
            if begins := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0", line):
                block = int(begins.group(1))
            elif re.match(r"#endif.*TORCH_FEATURE_VERSION", line):
                block = 10
            elif block <= 10:
                old += line + "\n"
            else:
                later += line + "\n"
    used = {symbol for symbol in undefined(library) if re.search("torch|c10|at_", symbol)}
    assert "torch_call_dispatcher" in used
    for symbol in used:
        assert re.search(rf"\b{symbol}\(", old), f"{symbol} is no function of torch's C interface of 2.10"
        assert not re.search(rf"\b{symbol}\(", later), f"{symbol} came after torch 2.10"


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_module_belongs_to_no_python():
    """By the limited API: `_C.abi3.so`, which takes no private name of the interpreter."""
    module = Path(_native.C.__file__)
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has a file of its own")
    assert module.name == "_C.abi3.so"
    assert not [symbol for symbol in undefined(module) if symbol.startswith("_Py") and symbol != "_Py_Dealloc"]


# --- the build backend ---------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "csrc/build"))
    monkeypatch.chdir(ROOT)
    import maefast_backend

    yield maefast_backend
    for name in ("maefast_backend", "torch_location"):
        sys.modules.pop(name, None)


def fake_torch(directory: Path, version: str, cuda: str | None = None) -> Path:
    package = directory / "torch"
    header = package / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (package / "__init__.py").write_text("raise RuntimeError('looking for torch must not import it')")
    (package / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = {cuda!r}\n")
    return package


@sources
def test_installed_torch_is_found_and_not_asked_for(backend):
    found = backend.find_torch()
    assert found.directory == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert not [r for r in hook() if r.startswith("torch")]


@sources
@pytest.mark.parametrize(
    ("version", "wanted"),
    [(None, True), ("2.9.1", True), ("1.13.1", True), ("2.10.0+cpu", False), ("2.13.0a0+git12", False), ("3.0", False)],
)
def test_torch_is_asked_for_only_where_it_is_missing(backend, monkeypatch, tmp_path, version, wanted):
    if version is not None:
        fake_torch(tmp_path, version)
    monkeypatch.setattr("torch_location.search_paths", lambda: [str(tmp_path)])
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert ("torch>=2.10" in hook()) is wanted


@sources
def test_torch_is_found_behind_build_isolation(backend, monkeypatch, tmp_path):
    """Isolation takes the target out of sys.path; the interpreter's own paths or VIRTUAL_ENV still name it."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    assert backend.find_torch().directory == Path(torch.__file__).parent

    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    other = fake_torch(tmp_path / "lib" / name / "site-packages", "2.11.0", "13.0")
    monkeypatch.setattr("torch_location.sysconfig.get_path", lambda name: str(tmp_path / "empty"))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert backend.find_torch() == (other, "2.11.0", "13.0")

    monkeypatch.setenv("MAEFAST_TORCH_DIR", str(fake_torch(tmp_path / "chosen", "2.12.0")))
    assert backend.find_torch().version == "2.12.0"


@sources
def test_namespace_directory_called_torch_is_no_torch(backend, tmp_path):
    (tmp_path / "torch").mkdir()
    assert backend.find_torch([str(tmp_path)]) is None


class Hook:
    """A build that fails until `works(cuda, settings)`; keeps what it was asked."""

    def __init__(self, works):
        self.works, self.calls = works, []

    def __call__(self, directory, settings, metadata_directory):
        cuda = os.environ["MAEFAST_CUDA"]
        self.calls.append((cuda, settings.get("wheel.cmake")))
        if not self.works(cuda, settings):
            raise SystemExit(1)
        with zipfile.ZipFile(Path(directory, "x.whl"), "w") as archive:
            archive.writestr("maefast/__init__.py", "")
            archive.writestr("maefast-0.dist-info/RECORD", "maefast/__init__.py,,\nmaefast-0.dist-info/RECORD,,\n")
        return "x.whl"


def run_build(backend, monkeypatch, tmp_path, works, **env):
    for name in ("MAEFAST_CUDA", "MAEFAST_REQUIRE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
        if name in env:
            monkeypatch.setenv(name, env[name])
    monkeypatch.setitem(os.environ, "MAEFAST_CUDA", env.get("MAEFAST_CUDA", ""))  # restored afterwards
    hook = Hook(works)
    return hook, lambda: backend._build(hook, str(tmp_path), None, None)


@sources
def test_failing_cuda_falls_back_to_the_cpu(backend, monkeypatch, tmp_path):
    hook, build = run_build(backend, monkeypatch, tmp_path, lambda cuda, settings: cuda == "off")
    build()
    assert hook.calls == [("auto", None), ("off", None)]
    assert backend.FAILURE_NOTE not in zipfile.ZipFile(tmp_path / "x.whl").namelist()


@sources
def test_failing_compiler_falls_back_to_python_and_says_so_in_the_wheel(backend, monkeypatch, tmp_path):
    hook, build = run_build(backend, monkeypatch, tmp_path, lambda cuda, settings: "wheel.cmake" in settings)
    build()
    assert hook.calls == [("auto", None), ("off", None), ("off", "false")]
    with zipfile.ZipFile(tmp_path / "x.whl") as wheel:
        assert b"the C++ build failed" in wheel.read(backend.FAILURE_NOTE)
        assert wheel.read("maefast-0.dist-info/RECORD").startswith(backend.FAILURE_NOTE.encode() + b",sha256=")


@sources
@pytest.mark.parametrize(
    "env", [{"MAEFAST_REQUIRE_NATIVE": "1"}, {"MAEFAST_CUDA": "on"}], ids=lambda env: next(iter(env))
)
def test_required_native_fails_the_build(backend, monkeypatch, tmp_path, env):
    hook, build = run_build(backend, monkeypatch, tmp_path, lambda cuda, settings: cuda == "off", **env)
    with pytest.raises(SystemExit, match="required"):
        build()
    assert len(hook.calls) == 1


@sources
def test_misspelt_cuda_choice_is_refused(backend, monkeypatch, tmp_path):
    hook, build = run_build(backend, monkeypatch, tmp_path, lambda cuda, settings: True, MAEFAST_CUDA="yes")
    with pytest.raises(SystemExit, match="choose auto, on or off"):
        build()
    assert not hook.calls


@sources
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("cmake") is None, reason="needs g++ and cmake")
def test_kernel_objects_share_no_inline_code(tmp_path):
    """The check behind the rule of csrc/cpu/isa.h: it passes a file of static code and refuses an inline function."""
    check = ["cmake", f"-DNM={shutil.which('nm')}"]
    for name, code, passes in (
        ("good", "static int twice(int x) { return 2 * x; } int f(int x) { return twice(x); }", True),
        ("bad", "inline int twice(int x) { return 2 * x; } int (*f)(int) = twice;", False),
    ):
        source, target = tmp_path / f"{name}.cpp", tmp_path / f"{name}.o"
        source.write_text(code)
        subprocess.run(["g++", "-O2", "-c", source, "-o", target], check=True)
        script = ["-P", str(ROOT / "csrc/build/no_shared_inlines.cmake")]
        result = subprocess.run([*check, f"-DOBJECTS={target}", *script], capture_output=True, text=True)
        assert (result.returncode == 0) is passes, result.stderr
        assert passes or "must not emit inline functions" in result.stderr
