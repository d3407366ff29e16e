"""Writes sparse.json: layer 0 of babyllama-1m pruned by SparseGPT and Wanda in PyTorch, written from the papers.

    python make_sparse.py SHARED [--time]

SHARED is the data folder with models/ and data/. With --time nothing is written: SparseGPT of one layer of the shape of
LLaMA-3.2-1B is timed on random weights and inputs (the counterpart of `cargo bench -p dsmoe-baselines --bench sparsegpt`).
Of every block of columns exactly floor(share * weights) are removed.
"""

import base64
import json
import sys
import time
from pathlib import Path

import numpy
import torch

SEQUENCES, TOKENS, BLOCK, DAMP = 8, 128, 128, 0.01


def hessian(inputs):
    """2 / sequences * sum of X^T X over sequences X [tokens, columns]."""
    total = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
    for x in inputs:
        total += x.T @ x
    return total * (2.0 / len(inputs))


def upper_factor(h):
    """R, upper triangular, with H^-1 = R^T R for the damped H."""
    h = h.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    h.diagonal().add_(DAMP * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def smallest(scores, count):
    """A mask of the count smallest, the first of equals."""
    order = scores.flatten().sort(stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def sparsegpt(weight, r, share=None, group=None):
    """The pruned weight and the mask of what is removed; group = (zeros, columns)."""
    w = weight.clone()
    rows, cols = w.shape
    removed = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, cols, BLOCK):
        end = min(first + BLOCK, cols)
        part, rb = w[:, first:end].clone(), r[first:end, first:end]
        errors = torch.zeros_like(part)
        mask = torch.zeros_like(part, dtype=torch.bool)
        if group is None:
            scores = part**2 / rb.diagonal() ** 2
            mask = smallest(scores, int(share * scores.numel()))
        for i in range(end - first):
            if group is not None and i % group[1] == 0:
                columns = slice(i, i + group[1])
                scores = part[:, columns] ** 2 / rb.diagonal()[columns] ** 2
                least = scores.sort(dim=1, stable=True).indices[:, : group[0]]
                mask[:, columns] = mask[:, columns].scatter(1, least, True)
            column = part[:, i]
            error = torch.where(mask[:, i], column / rb[i, i], torch.zeros(()))
            part[:, i:] -= torch.outer(error, rb[i, i:])
            part[mask[:, i], i] = 0.0
            errors[:, i] = error
        w[:, first:end] = part
        removed[:, first:end] = mask
        w[:, end:] -= errors @ r[first:end, end:]
    return w, removed


def wanda(weight, inputs, share):
    norms = torch.stack([x.norm(dim=0) ** 2 for x in inputs]).mean(0).sqrt()
    scores = weight.abs() * norms
    removed = torch.zeros_like(weight, dtype=torch.bool)
    least = scores.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * share)]
    removed.scatter_(1, least, True)
    return weight.masked_fill(removed, 0.0), removed


def case(weight, inputs, pruned, removed):
    x = torch.cat(inputs).double()
    error = (x @ (weight - pruned).double().T).square().sum() / (x @ weight.double().T).square().sum()
    bits = numpy.packbits((~removed).numpy(), axis=1, bitorder="little")
    return {"kept": base64.b64encode(bits.tobytes()).decode(), "error": error.item()}


def golden(shared):
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = shared / "models/babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = (shared / "data/corpora/stories/tinystories_lowercase_4M.txt").read_text()[:40000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: SEQUENCES * TOKENS]
    sequences = torch.tensor(ids).reshape(SEQUENCES, TOKENS)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layer = model.model.layers[0]
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    inputs = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0][0].clone()))
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
        cases = {"sparsegpt": {}, "sparsegpt 2:4": {}, "wanda": {}}
        for name, module in linears.items():
            w, x = module.weight.detach(), inputs[name]
            r = upper_factor(hessian(x))
            key = f"model.layers.0.{name}.weight"
            cases["sparsegpt"][key] = case(w, x, *sparsegpt(w, r, share=0.5))
            cases["sparsegpt 2:4"][key] = case(w, x, *sparsegpt(w, r, group=(2, 4)))
            cases["wanda"][key] = case(w, x, *wanda(w, x, 0.5))
    out = {"torch": torch.__version__, "sequences": sequences.tolist(), "cases": cases}
    Path(__file__).with_name("sparse.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
    for name, linears in cases.items():
        print(name, {key.split(".")[-2]: round(value["error"], 5) for key, value in linears.items()})


def timing():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden, kv, intermediate, tokens, sequences = 2048, 512, 8192, 2048, 2
    shapes = {
        "q, k, v": (hidden, [hidden, kv, kv]),
        "o": (hidden, [hidden]),
        "gate, up": (hidden, [intermediate, intermediate]),
        "down": (intermediate, [hidden]),
    }
    total = {"hessian": 0.0, "factor": 0.0, "sweep": 0.0}
    for name, (cols, rows) in shapes.items():
        inputs = [torch.randn(tokens, cols) for _ in range(sequences)]
        weights = [torch.randn(r, cols) for r in rows]
        marks = [time.perf_counter()]
        h = hessian(inputs)
        marks.append(time.perf_counter())
        r = upper_factor(h)
        marks.append(time.perf_counter())
        for w in weights:
            sparsegpt(w, r, share=0.5147)
        marks.append(time.perf_counter())
        seconds = [b - a for a, b in zip(marks, marks[1:])]
        print(name, [round(s, 3) for s in seconds], flush=True)
        for part, s in zip(total, seconds):
            total[part] += s
    print("torch", torch.__version__, {part: round(s, 3) for part, s in total.items()}, round(sum(total.values()), 3))


if __name__ == "__main__":
    if "--time" in sys.argv:
        timing()
    else:
        golden(Path(sys.argv[1]))
