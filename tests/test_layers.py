"""Imports point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path("maefast")
# What each package may read, beside itself, what it reads may read, and the small modules in LEAVES.
READS = {
    "ops": set(),
    "masking": {"ops", "graphs"},
    "graphs": set(),
    "optim": {"ops"},
    "nn": {"masking"},
    "data": {"nn", "recipe"},
    "recipe": {"nn", "data"},
    "models": {"data", "nn"},
    "integrations": {"models"},
    "doctor": {"ops"},
    "profiling": {"integrations", "doctor"},
    "check": {"profiling", "graphs"},
    "recipes": {"models", "recipe", "data"},
    "probe": {"recipes"},
    "finetune": {"probe"},
    "train": {"finetune", "optim", "profiling"},
}
LEAVES = {"errors", "names", "seeds", "_memory", "_native"}


def below(name: str) -> set[str]:
    found = {name, *READS[name], *LEAVES}
    for other in READS[name] - {"recipe"}:  # which names the types of data, and those that of a recipe
        found |= below(other)
    return found


def imported(tree: ast.AST) -> set[str]:
    """Names below maefast that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "maefast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maefast."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("maefast.")}
    return found


def test_nothing_imports_what_stands_above_it():
    for package in READS:
        files = sorted((ROOT / package).rglob("*.py")) or [ROOT / f"{package}.py"]
        for path in files:
            above = imported(ast.parse(path.read_text())) - below(package) - {"kernels"}
            assert not above, f"{path} imports {', '.join(sorted(above))} from above"


def test_imports_stay_light():
    """Dynamo alone takes longer to import than torch does."""
    code = "import sys, warnings, torch, maefast, maefast.cli, maefast.optim, maefast.models, maefast.nn\n"
    code += "warnings.simplefilter('ignore')\nmaefast.accelerate(torch.nn.Linear(2, 2))\n"
    code += "print(sorted(name for name in ('torch._dynamo', 'triton', 'transformers') if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
