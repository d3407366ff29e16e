"""The notebook of the examples runs from its first cell to its last."""

import importlib.util
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples/active_experts.ipynb"


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
