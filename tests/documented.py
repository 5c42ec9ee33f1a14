"""What the README and the docs tell their reader to type, and what they show of it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "results").glob("*.md"))]
VARIABLES = {"$seed": "0", "$recipe": "tiny"}
"""Of loops in commands."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page, out of the loop that it is in and without its comment."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Without the variables that are set for it."""
        words = shlex.split(self.text)
        while words and "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]
        return words


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^for .* do$|^(for .*; do )|^done$|\s+#.*$|^#.*$", "", line.strip())
                for part in re.split(r"; do |; |&& ", line):
                    for variable, value in VARIABLES.items():
                        part = part.replace(variable, value)
                    if part.strip() and part.strip() not in ("do", "done"):
                        found.append(Command(page.name, re.sub(r"\s+", " ", part.strip())))
    return found
