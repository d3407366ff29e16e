"""The programs of the documents run, with models of the tests in place of those that they name."""

import re
from pathlib import Path

import dsmoe
import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
PAGES = ["README.md", "docs/python.md", "dsmoe-bench/python/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_first_program_of_a_page_runs(page, dense, tmp_path, monkeypatch, capsys):
    if not (ROOT / page).is_file():
        pytest.skip("not in the repository")
    program = re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
    assert "DENSE" in program
    (tmp_path / "DENSE").symlink_to(dense, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    model, routing = names["model"], names["routing"]
    assert isinstance(model, dsmoe.Model) and model.num_experts == 8
    assert np.all((0 <= routing.counts) & (routing.counts <= 8))
    assert capsys.readouterr().out.count("\n") >= 2
