"""Functions are the commands: equal reports, equal files, equal messages."""

import inspect
import json
import logging

import dsmoe
import pytest
from conftest import without_times
from dsmoe import _native

# Options that the functions leave to `dsmoe.command`, and those that print lists.
LEFT_OUT = {"dist", "deadline", "list", "help", "version", "json", "quiet", "threads", "color", "hub"}
FUNCTIONS = {
    "inspect": dsmoe.inspect,
    "convert": dsmoe.convert,
    "prune": dsmoe.prune,
    "train": dsmoe.train,
    "eval": dsmoe.evaluate,
    "export": dsmoe.export,
    "init": dsmoe.init,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_the_options_of_the_command(name):
    arguments = set(inspect.signature(FUNCTIONS[name]).parameters) - {"model", "on_step"}
    words = {{"form": "as", "settings": "set"}.get(argument, argument).replace("_", "-") for argument in arguments}
    assert words == set(_native.options(name)) - LEFT_OUT


def test_reports_are_those_of_the_command(command, dense, sparse, text):
    for model in (dense, sparse):
        assert (0, dsmoe.inspect(model)) == command("inspect", model)
    assert (0, {"methods": dsmoe.methods()}) == command("methods")
    for options in ({}, {"threshold": 0.45}, {"dtype": "bf16", "stride": 100}, {"perplexity": ["stream", "rolling"]}):
        report = dsmoe.evaluate(sparse, data=text[0], seq=128, **options)
        words = [f"--{name}={','.join(v) if isinstance(v, list) else v}" for name, v in options.items()]
        status, theirs = command("eval", sparse, "--data", text[0], "--seq", 128, *words)
        assert status == 0 and without_times(report) == without_times(theirs)
        assert report["nll"] == theirs["nll"] > 0


def test_tasks_score_as_the_command_does(command, sparse):
    report = dsmoe.evaluate(sparse, tasks="world", limit=6)
    status, theirs = command("eval", sparse, "--tasks", "world", "--limit", 6)
    assert status == 0 and without_times(report) == without_times(theirs)


def test_models_are_those_of_the_command(command, work, dense, text):
    made = dsmoe.prune(dense, out=work / "ours", method="sparsegpt", budget="60%", calib=text[0], samples=4, seq=64)
    calibration = ["--calib", text[0], "--samples", 4, "--seq", 64]
    words = ["prune", dense, "--out", work / "theirs", "--method", "sparsegpt", "--budget", "60%", *calibration]
    status, theirs = command(*words)
    assert status == 0
    made["out"] = theirs["out"]
    assert without_times(made) == without_times(theirs)
    assert (work / "ours/model.safetensors").read_bytes() == (work / "theirs/model.safetensors").read_bytes()
    planned = dsmoe.prune(dense, method="random-k", budget=0.6, settings={"experts": 4}, dry_run=True)
    assert planned["settings"]["experts"] == 4


def run(model, out, text, **options):
    return dsmoe.train(model, out=out, data=text[0], steps=4, batch=2, seq=32, lr=1e-3, **options)


def test_a_training_calls_back_and_is_that_of_the_command(command, work, sparse, text):
    records = []
    report = run(sparse, work / "run", text, on_step=records.append)
    words = ["--data", text[0], "--steps", 4, "--batch", 2, "--seq", 32, "--lr", "1e-3"]
    status, theirs = command("train", sparse, "--out", work / "their-run", *words)
    assert status == 0 and report["finished"] and report["loss"] == theirs["loss"]
    assert report["valid_nll"] == theirs["valid_nll"]
    ours, them = (work / name / "model.safetensors" for name in ("run", "their-run"))
    assert ours.read_bytes() == them.read_bytes()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    lines = (work / "their-run/metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "lr" in line]
    assert [record["loss"] for record in records] == [step["loss"] for step in steps]


def test_a_callback_stops_a_training_that_resumes(work, sparse, text):
    whole = run(sparse, work / "whole", text)
    out = work / "stopped"
    report = run(sparse, out, text, on_step=lambda record: record["step"] < 2)
    assert not report["finished"] and report["step"] == 2

    class Mine(Exception):
        pass

    def fail(record):
        raise Mine(record["step"])

    with pytest.raises(Mine, match="3"):
        run(sparse, out, text, resume=True, on_step=fail)
    resumed = run(sparse, out, text, resume=True)
    assert resumed["finished"] and resumed["loss"] == whole["loss"]
    assert (out / "model.safetensors").read_bytes() == (work / "whole/model.safetensors").read_bytes()


def test_errors_have_the_text_of_the_command(command, work, dense, sparse, text):
    broken = work / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    bad = work / "bad.txt"
    bad.write_bytes(b"\xff\xfe\xff")
    cases = [
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.convert(dense, out=work / "no", experts=7), ("convert", dense, "--out", work / "no", "--experts", 7)),
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.command("inspect", dense, no_such=1), ("inspect", dense, "--no-such=1")),
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.train(dense, out=work / "no"), ("train", dense, "--out", work / "no")),
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.convert(dense, out=sparse, experts=8), ("convert", dense, "--out", sparse, "--experts", 8)),
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.evaluate(dense, data=text[0], threshold=0.5), ("eval", dense, "--data", text[0], "--threshold", 0.5)),
        (dsmoe.ArgumentError, ValueError, lambda: dsmoe.evaluate(dense, data=text[0], seq=1), ("eval", dense, "--data", text[0], "--seq", 1)),
        (dsmoe.FormatError, ValueError, lambda: dsmoe.inspect(broken), ("inspect", broken)),
        (dsmoe.FormatError, ValueError, lambda: dsmoe.evaluate(dense, data=bad), ("eval", dense, "--data", bad)),
        (dsmoe.NotFoundError, OSError, lambda: dsmoe.evaluate(dense, data=work / "none.txt"), ("eval", dense, "--data", work / "none.txt")),
    ]
    for kind, builtin, ours, theirs in cases:
        with pytest.raises(kind) as caught:
            ours()
        status, report = command(*theirs)
        assert status in (1, 2) and str(caught.value) == report["error"]
        assert isinstance(caught.value, builtin) and isinstance(caught.value, dsmoe.DsmoeError)
    with pytest.raises(FileNotFoundError):
        dsmoe.evaluate(dense, data=work / "none.txt")
    with pytest.raises(dsmoe.ArgumentError, match="process of its own"):
        dsmoe.command("reproduce")
    assert issubclass(dsmoe.Stopped, dsmoe.DsmoeError)


def test_threads_are_chosen_before_they_run(dense):
    dsmoe.inspect(dense)
    with pytest.raises(ValueError, match="before the first call"):
        dsmoe.set_threads(2)


def test_notes_are_logged(caplog, work, dense, text):
    with caplog.at_level(logging.INFO, "dsmoe"):
        run(dense, work / "noted", text)
    assert any("training: " in line for line in caplog.messages)
