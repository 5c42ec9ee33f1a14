"""The notebooks of analysis/ as pages: their plotly figures drawn by a copy of plotly.js that is part of the site."""

import json
import re
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx

PLOTLY = "application/vnd.plotly.v1+json"
SOURCE = Path(__file__).parents[2] / "analysis" / "notebooks"


def copy_notebooks(app: Sphinx) -> None:
    """Into notebooks/ of the sources, which git ignores; only what has changed, so that Sphinx rereads no more."""
    folder = Path(app.srcdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for path in SOURCE.glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = re.sub(r"\]\(\.\./\.\./docs/", "](../", "".join(cell["source"]))
            for i, output in enumerate(cell.get("outputs", [])):
                draw(output.get("data", {}), f"{cell['id']}-{i}")
        write_if_changed(folder / path.name, json.dumps(notebook, indent=1))
    write_if_changed(Path(app.srcdir) / "static" / "plotly.min.js", get_plotlyjs())


def draw(data: dict[str, Any], name: str) -> None:
    """Put HTML in the place of a plotly figure; drawn once the page, and with it plotly.js, has been loaded."""
    if (figure := data.pop(PLOTLY, None)) is None:
        return
    arguments = json.dumps([name, figure["data"], figure["layout"], {"responsive": True, "displayModeBar": False}])
    arguments = arguments.replace("<", "\\u003c")  # nothing in it may end the script element
    height = figure["layout"].get("height", 420)
    data["text/html"] = (
        f'<div id="{name}" style="height: {height}px"></div>'
        f'<script>addEventListener("load", () => Plotly.newPlot(...{arguments}));</script>'
    )


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy_notebooks)
    app.add_js_file("plotly.min.js", priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
