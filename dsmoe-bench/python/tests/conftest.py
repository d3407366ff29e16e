"""Models that the tests share, and the command to compare with."""

import json
import os
import subprocess
from pathlib import Path

import dsmoe
import pytest

# Fields of reports that say how long something took or took up.
TIMES = ("seconds", "per_s", "wall_s", "rss_bytes", "date")


def without_times(value):
    """Leave out of a report what no two runs have in common."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith(TIMES) and k != "tokens_per_s"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def command():
    """Run the command with --json; returns its exit status and its report."""
    program = os.environ.get("DSMOE_COMMAND")
    if program is None:
        pytest.skip("DSMOE_COMMAND does not name the command to compare with")

    def run(*words):
        line = [program, *map(str, words), "--json", "--quiet"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        return done.returncode, json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("dsmoe")


@pytest.fixture(scope="session")
def world(work):
    """Text and a tokenizer."""
    out = work / "world"
    dsmoe.command("data world", out=out, bytes="120KB", vocab=512)
    return out


@pytest.fixture(scope="session")
def text(world):
    return sorted((world / "text").iterdir())


@pytest.fixture(scope="session")
def dense(work, world):
    out = work / "dense"
    dsmoe.init(out=out, preset="world", tokenizer=world / "tokenizer.json", seed=3)
    return out


@pytest.fixture(scope="session")
def sparse(work, dense):
    out = work / "sparse"
    dsmoe.convert(dense, out=out, experts=8, seed=1)
    return out


@pytest.fixture(scope="session")
def model(sparse):
    return dsmoe.load(sparse)


@pytest.fixture(scope="session")
def ids(model, text):
    return model.encode(Path(text[0]).read_text()[:3000])[:160]
