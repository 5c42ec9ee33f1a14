"""The documentation tells the truth: every command is one that its script understands, every link leads somewhere."""

import importlib
import re

import pytest
import tyro

from tests.documented import PAGES, ROOT, blocks, commands

COMMANDS = commands()


def test_there_are_commands():
    assert len(COMMANDS) > 50
    assert {command.page for command in COMMANDS} >= {"README.md", "molt.md", "training.md", "results.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{command.page}: {command.text[:60]}" for command in COMMANDS])
def test_a_command_is_understood(command):
    words = command.words
    if words[0] == "accelerate":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "python":
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        parse(module, words[3:] if words[1] == "-m" else words[2:])
    elif words[0].endswith("pip"):
        extras = re.search(r"\.\[([\w,]+)\]", " ".join(words))
        for extra in extras[1].split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    else:
        assert words[0] in ("git", "cd", ".venv/bin/jupyter"), words


def parse(module: str, argv: list[str]) -> None:
    """By the script's own parser; SystemExit where it does not understand."""
    loaded = importlib.import_module(f"{module}.__main__" if module == "analysis.dashboards" else module)
    if argv == ["--help"] or module.startswith("tests.benchmarks"):
        assert callable(loaded.main if module.startswith("tests") else loaded.COMMAND.parse)
    elif hasattr(loaded, "COMMAND"):
        if argv[:1] == ["--resume"]:  # of a run that is not there
            assert len(argv) == 2
        else:
            loaded.COMMAND.parse(argv)
    elif module == "training.data":
        tyro.extras.get_parser(getattr(loaded, argv[0])).parse_args(argv[1:])
    elif module == "cayley_interp.convert":
        assert len(argv) == 2
    else:
        asked = getattr(loaded, "Options", None) or getattr(loaded, "main", None) or loaded.match
        tyro.extras.get_parser(asked).parse_args(argv[: argv.index("--")] if "--" in argv else argv)


PYTHON = [
    pytest.param(block, id=f"{page.name} {i}", marks=[pytest.mark.gemma] if "gemma" in block else [])
    for page in PAGES
    for i, block in enumerate(blocks(page, "python"))
]
FEWER = {
    "n_tokens = 300_000": "n_tokens = 20_000",
    "training_steps=steps)": "training_steps=steps, moments_tokens=n_tokens)",
}
"""In the place of what a test cannot wait for."""


def test_there_are_blocks():
    assert len(PYTHON) >= 7


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs_as_it_stands(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for many, few in FEWER.items():
        block = block.replace(many, few)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    assert bool(capsys.readouterr().out.strip()) >= ("print(" in block)  # what it says it prints, it does


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "#")):
            continue
        path = target.split("#")[0]
        if page.parent.name == "docs":  # where the site has a copy
            path = re.sub("^notebooks/", "../analysis/notebooks/", path)
        assert (page.parent / path).exists(), target
