"""The same model in transformers, in the same process.

Where torch is installed, transformers runs its PyTorch classes, sparse FFNs included; else its Flax classes, which are of
dense models only. `transformers.txt` lists the packages of the second case.
"""

import importlib.util
import os
import threading
from pathlib import Path

import dsmoe
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
TORCH, FLAX = (importlib.util.find_spec(name) is not None for name in ("torch", "flax"))
if not TORCH and not FLAX:
    pytest.skip("neither torch nor flax is installed", allow_module_level=True)

SHARED = Path(os.environ.get("DSMOE_SHARED", ""))
CHECKPOINTS = ("stories-260k", "babyllama-1m")
# Letters of several scripts, symbols, spaces in a row, line ends.
STRANGE = "Ünïcode — 日本語 ✓ 🙂\n\n  two  spaces\tand a tab\r\n"


def load_by_torch(path):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

    def run(ids):
        with torch.no_grad():
            found = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
        return found.logits[0].numpy(), [states[0].numpy() for states in found.hidden_states]

    return run


def load_by_flax(path):
    import jax

    class Llama(transformers.FlaxLlamaForCausalLM):
        def init_weights(self, rng, input_shape, params=None):
            # Shapes alone: the file has the values.
            init = super().init_weights
            return jax.eval_shape(lambda: init(rng, input_shape))

    model = Llama.from_pretrained(path)
    params = dict(model.params)
    if model.config.tie_word_embeddings:
        params["lm_head"] = {"kernel": params["model"]["embed_tokens"]["embedding"].T}

    @jax.jit
    def forward(ids, params):
        found = model(ids, params=params, output_hidden_states=True)
        return found.logits[0], [states[0] for states in found.hidden_states]

    def run(ids):
        logits, states = forward(ids.astype(np.int32)[None], params)
        return np.asarray(logits), [np.asarray(array) for array in states]

    return run


def load_theirs(path):
    """Load a model by transformers; returns a function from ids to logits and hidden states."""
    return (load_by_torch if TORCH else load_by_flax)(path)


@pytest.fixture(scope="module")
def dense_theirs(dense, work):
    return load_theirs(dsmoe.export(dense, form="hf", out=work / "hf-dense")["out"])


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request):
    """A trained model of the shared data folder."""
    path = SHARED / "models" / request.param
    if not os.environ.get("DSMOE_SHARED") or not path.is_dir():
        assert "shared" not in os.environ.get("DSMOE_REQUIRE", "").split(","), f"{path} is not there"
        pytest.skip("the shared data folder is not there")
    return path


def check_equal(model, run, ids):
    logits, states = model.logits(ids), model.hidden_states(ids)
    their_logits, their_states = run(ids)
    assert logits.shape == their_logits.shape and np.abs(logits - their_logits).max() < 2e-4
    assert len(states) == len(their_states)
    for ours, them in zip(states, their_states):
        assert np.abs(ours - them).max() < 2e-4


def check_tokenizer(model, theirs, texts):
    for text in texts:
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert model.encode(text, bos="never").tolist() == want
        assert model.decode(want) == theirs.decode(want, clean_up_tokenization_spaces=False)


def test_logits_and_states_are_those_of_transformers(dense, dense_theirs, ids):
    check_equal(dsmoe.load(dense), dense_theirs, ids)


def test_logits_and_states_of_a_trained_model_are_those_of_transformers(checkpoint, text):
    model = dsmoe.load(checkpoint, dtype="f32")
    check_equal(model, load_theirs(checkpoint), model.encode(text[0].read_text()[:2000])[:160])


@pytest.mark.skipif(not TORCH, reason="torch is not installed, and the Flax classes have no sparse FFNs")
def test_a_sparse_model_is_that_of_transformers(sparse, work, model, ids):
    import torch

    check_equal(model, load_theirs(dsmoe.export(sparse, form="hf", out=work / "hf-sparse")["out"]), ids)
    logits = model.logits(ids)
    torch.from_numpy(logits)[0, 0] = 7.0
    assert logits[0, 0] == 7.0


def test_a_sparse_model_whose_experts_all_run_is_the_dense_one_in_transformers(dense, dense_theirs, work, ids):
    split = work / "split"
    dsmoe.convert(dense, out=split, experts=8, partition="random", gate_value="binary", seed=7)
    model = dsmoe.load(split, threshold=0.0)
    assert model.routing(ids).active.all()
    check_equal(model, dense_theirs, ids)
    # With some experts left out it is another model.
    model.set_gates(threshold=0.5)
    assert 0.0 < model.routing(ids).active.mean() < 1.0
    assert np.abs(model.logits(ids) - dense_theirs(ids)[0]).max() > 2e-2
    back = dsmoe.export(split, form="dense", out=work / "split-dense")["out"]
    check_equal(dsmoe.load(back), load_theirs(back), ids)


def test_tokens_are_those_of_transformers(dense, text):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(dense / "tokenizer.json"))
    check_tokenizer(dsmoe.load(dense), theirs, [*(path.read_text()[:20_000] for path in text[:3]), STRANGE])


def test_tokens_of_a_trained_model_are_those_of_transformers(checkpoint, text):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    check_tokenizer(dsmoe.load(checkpoint), theirs, [text[0].read_text()[:20_000], STRANGE])


def test_both_run_at_the_same_time(dense, dense_theirs, ids):
    model = dsmoe.load(dense)
    want, equal, done = model.logits(ids), [], threading.Event()

    def work_meanwhile():
        while not done.is_set():
            equal.append(np.array_equal(model.logits(ids), want))

    other = threading.Thread(target=work_meanwhile)
    other.start()
    try:
        for _ in range(5):
            before = len(equal)
            logits, _ = dense_theirs(ids)
            assert np.abs(logits - want).max() < 2e-4
            while len(equal) == before and other.is_alive():
                done.wait(0.01)
    finally:
        done.set()
        other.join()
    assert len(equal) >= 5 and all(equal)
