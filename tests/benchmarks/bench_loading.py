"""What importing the package and loading a model take, each in a process of its own."""

import subprocess
import sys

from tests.benchmarks.measure import Call, Group

NOTES = ["Loading: processes whose files the system has cached; the first of each after boot takes longer."]


def process(code: str) -> Call:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def groups(device: str) -> list[Group]:
    if device != "cpu":
        return []
    load = "cayley_interp.load_pretrained('cayley-tiny-2L-sotu', wrap=None)"
    return [
        Group(
            "Start of a process",
            "one process",
            "fp32",
            {
                "import torch": lambda: process("import torch"),
                "import cayley_interp": lambda: process("import cayley_interp"),
                f"import cayley_interp; {load}": lambda: process(f"import cayley_interp; {load}"),
            },
        )
    ]
