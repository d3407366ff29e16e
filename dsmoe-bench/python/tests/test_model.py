"""A model in memory: arrays, text, threads."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import dsmoe
import numpy as np
import pytest
from conftest import without_times
from dsmoe import _commands


# A model that was not trained ends its text at once, or repeats a token without text.
FREE = {"ignore_eos": True, "temperature": 1.0, "seed": 2}


def test_generation_and_perplexity_are_those_of_the_command(command, sparse, model, text):
    for options in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}, FREE | {"stop": ["the", "a"]}):
        report = model.generate("In the north", max_tokens=24, **options)
        flags = _commands._words(options)
        status, theirs = command("generate", sparse, "--prompt", "In the north", "--max-tokens", 24, *flags)
        assert status == 0 and without_times(report) == without_times(theirs)
    plain = sparse.with_name("plain.txt")
    plain.write_text(text[0].read_text()[:20_000].strip())
    report = model.evaluate(model.encode(plain.read_text()), seq=96, stride=64)
    status, theirs = command("eval", sparse, "--data", plain, "--seq", 96, "--stride", 64)
    theirs = {name: theirs[name] for name in report}
    assert status == 0 and without_times(report) == without_times(theirs)


def test_text_comes_as_it_is_made(model):
    pieces = []
    report = model.generate("In the", max_tokens=12, on_text=pieces.append, **FREE)
    assert "".join(pieces) == report["text"] and len(pieces) > 1
    report = model.generate("In the", max_tokens=12, on_text=lambda text: False, **FREE)
    assert report["finish"] == "stop" and report["generated_tokens"] < 12
    with pytest.raises(ZeroDivisionError):
        model.generate("In the", on_text=lambda text: 1 / 0, **FREE)


def test_logits_are_what_generation_chooses_from(model, ids):
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.vocab_size) and logits.dtype == np.float32
    assert np.array_equal(model.logits(ids, last=1)[0], logits[-1])
    assert np.array_equal(model.logits(ids.tolist()), logits)
    assert np.array_equal(model.logits(ids.astype(np.int64)), logits)
    prompt = "In the north"
    new = model.generate(prompt, max_tokens=1, ignore_eos=True)["new_token_ids"]
    assert new == [model.logits(model.encode(prompt), last=1).argmax()]
    # The mean likelihood of the text is the perplexity.
    exact = logits.astype(np.float64)
    norms = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    nll = np.mean(norms[:-1] - exact[np.arange(len(ids) - 1), ids[1:]])
    assert abs(nll - model.evaluate(ids, seq=len(ids))["nll"]) < 1e-5


def test_states_and_routes(model, dense, ids):
    states = model.hidden_states(ids)
    assert states.shape == (model.num_layers + 1, len(ids), model.hidden_size)
    embedding = dsmoe.tensors(dense)["model.embed_tokens.weight"]
    assert np.array_equal(states[0], embedding[ids])
    routing = model.routing(ids)
    assert routing.active.shape == (model.num_layers, len(ids), 8) and routing.active.dtype == np.bool_
    assert np.array_equal(routing.counts, routing.active.sum(-1))
    assert ((routing.coefficients > 0) == routing.active).all()
    share = model.evaluate(ids, seq=len(ids))["active_ratio_per_layer"]
    assert routing.summary["active_ratio_per_layer"] == pytest.approx(routing.active.mean((1, 2)))
    # The last token of a window is predicted, not run.
    assert routing.active[:, :-1].mean((1, 2)) == pytest.approx(share)
    with pytest.raises(ValueError, match="no experts"):
        dsmoe.load(dense).routing(ids)


def test_the_example_shows_the_numbers_of_the_command(command, sparse, model):
    prompt = "In the north a fisher lives by the sea."
    example = Path(__file__).parents[1] / "examples/active_experts.py"
    done = subprocess.run([sys.executable, example, sparse, "--prompt", prompt], capture_output=True, text=True, check=True)
    # The prompt alone is run: the one new token is not.
    status, theirs = command("generate", sparse, "--prompt", prompt, "--max-tokens", 1)
    assert status == 0 and f"active share {theirs['active_ratio']:.6f}\n" in done.stdout
    for layer, share in enumerate(theirs["active_ratio_per_layer"]):
        assert f"layer {layer:3}  {8 * share:6.2f} of 8  " in done.stdout
    summary = model.routing(model.encode(prompt)).summary
    assert [summary[name] for name in ("active_ratio", "active_ratio_per_layer")] == [
        theirs[name] for name in ("active_ratio", "active_ratio_per_layer")
    ]


def test_arrays_are_rust_s_memory_and_outlive_the_model(sparse, ids):
    model = dsmoe.load(sparse)
    model.logits(ids)
    tracemalloc.start()
    logits, states = model.logits(ids), model.hidden_states(ids)
    numpy_allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numpy_allocated < min(logits.nbytes, states.nbytes) / 4
    for array in (logits, states, model.routing(ids).active):
        assert not array.flags.owndata and array.base is not None and not isinstance(array.base, np.ndarray)
    before = logits.copy()
    del model
    gc.collect()
    junk = [np.ones_like(logits) for _ in range(4)]
    assert np.array_equal(logits, before) and len(junk) == 4
    logits[0, 0] = 1.5
    assert logits[0, 0] == 1.5


def test_tensors_are_maps_of_the_files(work, sparse):
    copy = dsmoe.export(sparse, form="native", out=work / "bf16", dtype="bf16")["out"]
    wide, narrow = dsmoe.tensors(sparse), dsmoe.tensors(copy)
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        base = tensor
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap) and not tensor.flags.writeable
        if narrow[name].dtype == np.uint16:
            values = (narrow[name].astype(np.uint32) << 16).view(np.float32)
            assert np.allclose(values, tensor, rtol=2**-8, atol=0), name
    with pytest.raises(FileNotFoundError):
        dsmoe.tensors(work / "none")


def test_gates_can_be_chosen(model, sparse, ids):
    own = dsmoe.load(sparse)
    shares = []
    for threshold in (0.0, 1.0):
        own.set_gates(threshold=threshold)
        shares.append(own.routing(ids).active.mean())
    assert shares == [1.0, 0.0]
    assert dsmoe.load(sparse, threshold=1.0).routing(ids).active.mean() == 0.0
    for wrong in ({"threshold": 2.0}, {"active": 0.5}, {}):
        with pytest.raises(dsmoe.ArgumentError):
            own.set_gates(**wrong)


def test_a_callback_may_use_the_model(model, ids):
    seen = []

    def use(text):
        seen.append(model.logits(ids[:8], last=1))
        with pytest.raises(dsmoe.ArgumentError, match="in use"):
            model.set_gates(threshold=0.5)

    model.generate("In the", max_tokens=6, on_text=use, **FREE)
    assert seen and all(np.array_equal(array, model.logits(ids[:8], last=1)) for array in seen)


def test_wrong_arguments_raise(model, ids, work, dense):
    for call in (
        lambda: model.logits([]),
        lambda: model.logits([model.vocab_size]),
        lambda: model.logits(ids, last=len(ids) + 1),
        lambda: model.logits([0] * (model.max_positions + 1)),
        lambda: model.generate("In", temperature=-1.0),
        lambda: model.generate("In", bos="perhaps"),
        lambda: model.generate("In", stop=[""]),
        lambda: dsmoe.load(dense, dtype="f8"),
        lambda: dsmoe.load(dense, device="tpu"),
        lambda: dsmoe.load(dense, active=0.5),
    ):
        with pytest.raises(dsmoe.ArgumentError):
            call()
    for wrong in ([-1], [1.5], ["a"], np.zeros((2, 2), np.uint32), np.zeros(3, np.float32), None):
        with pytest.raises((TypeError, OverflowError)):
            model.logits(wrong)
    with pytest.raises(dsmoe.DsmoeError):
        dsmoe.load(work / "none")


def test_other_threads_run_meanwhile(model, text):
    ids = model.encode(text[0].read_text())
    turns, done = [0], threading.Event()

    def count():
        while not done.is_set():
            time.sleep(0.001)
            turns[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    started, before = time.monotonic(), turns[0]
    while time.monotonic() - started < 0.5:
        model.evaluate(ids, seq=128)
    counted = turns[0] - before
    done.set()
    counter.join()
    assert counted > 50, counted


def test_threads_may_share_a_model(model, ids):
    want, found = model.logits(ids), []
    threads = [threading.Thread(target=lambda: found.append(model.logits(ids))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(array, want) for array in found)


def interrupted(work, delay=0.4):
    """Returns the seconds from a Ctrl-C to the exception of the work that it ends."""
    sent = []

    def send():
        time.sleep(delay)
        sent.append(time.monotonic())
        os.kill(os.getpid(), 2)

    # Shells start jobs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
            pytest.fail("the work came to its end")
        return time.monotonic() - sent[0]
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_long_work(work, model, dense, sparse, world, text):
    dsmoe.command("data world", out=work / "more", bytes="1MB", vocab=512)
    more = sorted((work / "more/text").iterdir())
    config = json.loads((dense / "config.json").read_text())
    (work / "long.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    dsmoe.init(out=work / "long", config=work / "long.json", tokenizer=world / "tokenizer.json")
    endless, many = dsmoe.load(work / "long"), np.tile(model.encode(text[0].read_text()), 400)
    out = work / "interrupted"
    for slow in (
        lambda: model.evaluate(many),
        lambda: endless.generate("In the", max_tokens=10**6, ignore_eos=True),
        lambda: dsmoe.prune(dense, out=out, method="sparsegpt", budget="60%", calib=more, samples=1500, seq=256),
        lambda: dsmoe.evaluate(sparse, data=more),
        lambda: dsmoe.train(sparse, out=work / "run-on", data=text, steps=10**6, batch=2, seq=32),
    ):
        assert interrupted(slow) < 20
    assert not out.exists() and not [path for path in work.iterdir() if "interrupted" in path.name]
    rest = {"data": text, "steps": 10**6, "batch": 2, "seq": 32, "resume": True, "stop_after": 1}
    assert dsmoe.train(sparse, out=work / "run-on", **rest)["step"] > 1
    assert np.array_equal(model.logits([1, 2, 3]), model.logits([1, 2, 3]))
