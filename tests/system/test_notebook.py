"""examples/quickstart.ipynb, executed by a kernel in a folder of its own: what a reader sees."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_a_bar_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is kept in the repository has none
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, play, table, picture, alive, right, size = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar, *_ = [output for output in play.outputs if output.output_type == "display_data"]
    assert "5/5 loss" in re.sub(r"\x1b\[[\d;]*m", "", bar.data["text/plain"])
    lines = "".join(output.text for output in play.outputs if output.output_type == "stream")
    assert "__main__:net with" in lines
    assert "round 1/5" not in lines
    assert "5 of 5 rounds" in play.outputs[-1].data["text/plain"]
    assert "central_accuracy" in table.outputs[0].data["text/html"]
    assert "image/png" in picture.outputs[0].data
    assert "'1.weight'" in alive.outputs[0].data["text/plain"]
    assert int(right.outputs[0].data["text/plain"].split("on ")[1].split("%")[0]) > 50
    sparse, dense = map(int, size.outputs[0].data["text/plain"].strip("()").split(","))
    assert sparse < dense
