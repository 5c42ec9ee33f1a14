"""Which package may import which, and what `import cayley_interp` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "cayley_interp": set(),
    "molt_lens": {"cayley_interp.kernels"},  # this module alone: one switch for the kernels of both
    "analysis": {"cayley_interp", "molt_lens"},
    "training": {"cayley_interp", "molt_lens", "analysis"},
}


def imported(file: Path) -> set[str]:
    """Full names of the modules a file imports, or imports from, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def is_forbidden(package: str, module: str) -> bool:
    """A package is allowed with all its modules, a module by itself."""
    top = module.partition(".")[0]
    return top in {*ALLOWED, "tests"} - {package} and not {top, module} & ALLOWED[package]


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        forbidden = {module for module in imported(file) if is_forbidden(package, module)}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {forbidden}"


def test_the_one_module_is_told_from_its_neighbours():
    assert not is_forbidden("molt_lens", "cayley_interp.kernels")
    assert not is_forbidden("analysis", "cayley_interp.atoms")
    for module in ("cayley_interp", "cayley_interp.atoms", "cayley_interp.kernels.walsh", "tests.helpers"):
        assert is_forbidden("molt_lens", module)


@pytest.mark.parametrize("package", ["cayley_interp", "molt_lens"])
def test_importing_a_package_brings_nothing_heavier_than_torch(package):
    code = (
        f"import sys, torch, numpy, jaxtyping, safetensors; before = set(sys.modules); import {package}; "
        "new = set(sys.modules) - before; print(*{m.split('.')[0] for m in new}, *new & {'torch._dynamo'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = set(out.stdout.split()) - {package}
    heavy = {
        *("transformer_lens", "sae_lens", "transformers", "datasets", "triton", "wandb", "plotly", "tokenizers"),
        *("accelerate", "rich", "tyro", "pandas", "sklearn", "scipy", "training", "analysis", "torch._dynamo"),
    }
    assert not new & heavy


def test_file_and_function_budgets():
    too_long = []
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text()
            if source.count("\n") > 400:
                too_long.append(f"{file.relative_to(ROOT)}: {source.count(chr(10))} lines")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                    too_long.append(f"{file.relative_to(ROOT)}:{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not too_long
