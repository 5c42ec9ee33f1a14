"""The README tells the truth: its Python runs, its tree is the tree, its recipes and make targets exist."""

import re
from pathlib import Path

from training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_runs(capsys):
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "0.0625" in out
    assert re.search(r"most active leaf of layer 3: \d+ child of \d+", out)
    assert float(re.search(r"largest change of a logit: (\S+)", out)[1]) > 1e-3
    assert "the people of the United States" in out


def test_the_tree_is_the_tree():
    package, listed = "", set()
    for line in README.split("## The tree")[1].splitlines():
        if match := re.match(r"(\w+)/ ", line):
            package = match[1]
        elif match := re.match(r"  (\w+\.py) ", line):
            listed.add(f"{package}/{match[1]}")
    found = {
        str(file.relative_to(ROOT))
        for package in ("cayley_interp", "molt_lens", "training", "analysis")
        for file in (ROOT / package).glob("*.py")
        if file.name != "__init__.py"
    }
    assert listed == found


def test_every_recipe_and_command_named_exists():
    for name in RECIPES:
        assert f"`{name}`" in README
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert f"\n{target}:" in makefile, target
    for script in re.findall(r"python (training/\w+\.py)", README):
        assert (ROOT / script).exists()
