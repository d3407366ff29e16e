"""The same model in transformers, in the same process."""

import dsmoe
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_logits_and_states_are_those_of_transformers(kind, request, work, ids):
    path = request.getfixturevalue(kind)
    exported = dsmoe.export(path, form="hf", out=work / f"hf-{kind}")["out"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model = dsmoe.load(path)
    with torch.no_grad():
        found = theirs(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    logits, states = model.logits(ids), model.hidden_states(ids)
    assert np.abs(logits - found.logits[0].numpy()).max() < 2e-4
    assert len(found.hidden_states) == len(states)
    for ours, them in zip(states, found.hidden_states):
        assert np.abs(ours - them[0].numpy()).max() < 2e-4
    shared = torch.from_numpy(logits)
    shared[0, 0] = 7.0
    assert logits[0, 0] == 7.0
