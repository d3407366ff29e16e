"""The types that the package declares are those that it has."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _needs_mypy():
    pytest.importorskip("mypy", reason="mypy is not installed")


def check(*words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stubs_are_those_of_the_module(tmp_path):
    check("mypy.stubtest", "dsmoe", "--mypy-config-file", str(FOLDER.parent / "pyproject.toml"))


def test_the_package_and_its_use_are_typed(tmp_path):
    use = tmp_path / "use.py"
    use.write_text(
        "import dsmoe\n"
        "import numpy as np\n"
        "import numpy.typing as npt\n"
        "model: dsmoe.Model = dsmoe.load('M', dtype='bf16')\n"
        "logits: npt.NDArray[np.float32] = model.logits(model.encode('text'))\n"
        "counts: npt.NDArray[np.uint32] = model.routing([1, 2]).counts\n"
        "dsmoe.train('M', out='R', data=['a', 'b'], on_step=lambda record: record['step'] < 3)\n"
    )
    check("mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "-p", "dsmoe")
    check("mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(use))
    use.write_text("import dsmoe\ndsmoe.load(3)\ndsmoe.convert('M')\n")
    wrong = subprocess.run([sys.executable, "-m", "mypy", str(use)], capture_output=True, text=True)
    assert wrong.stdout.count("error:") == 2, wrong.stdout
