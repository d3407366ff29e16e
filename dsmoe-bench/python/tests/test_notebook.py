"""The notebook of the examples runs from its first cell to its last, and the program beside it draws its chart."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "active_experts.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"


def is_chart(path):
    written = path.read_bytes()
    return written.startswith(PNG) and len(written) > 1000


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        needs = cell["metadata"].get("needs")
        if cell["cell_type"] == "code" and (needs is None or importlib.util.find_spec(needs)):
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    routing, model, shares = names["routing"], names["model"], names["shares"]
    assert routing.counts.shape == (routing.active.shape[0], len(names["ids"]))
    assert routing.counts.max() <= model.num_experts
    falling = list(shares.values())
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]
    if importlib.util.find_spec("matplotlib"):
        names["figure"].savefig("active.png")
        assert is_chart(tmp_path / "active.png")


def test_the_example_writes_a_chart(sparse, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(sys, "argv", ["active_experts.py", str(sparse), "--out", str(tmp_path / "active.png")])
    runpy.run_path(str(EXAMPLES / "active_experts.py"), run_name="__main__")
    assert is_chart(tmp_path / "active.png")
    assert "layer   0" in capsys.readouterr().out
