"""Writes grow.json: LESA's steps 1 to 6 (arXiv 2502.13794, 8.1) with a fixed network, by NumPy's SVD and PyTorch's layers.

    python make_grow.py grow.json
"""

import json
import sys

import numpy
import torch

ROWS, COLS, LAYERS, HIDDEN = 12, 7, 4, 6


def main():
    random = numpy.random.default_rng(11)
    weights = random.normal(size=(LAYERS, ROWS, COLS)).astype(numpy.float32)
    u, s, v = numpy.linalg.svd(numpy.concatenate(weights.astype(numpy.float64), axis=1), full_matrices=False)
    # Of a column of U and its opposite, the one whose largest entry is positive.
    largest = numpy.abs(u).argmax(axis=0)
    signs = numpy.sign(u[largest, numpy.arange(u.shape[1])])
    u, v = u * signs, v * signs[:, None]
    parts = numpy.split(v, LAYERS, axis=1)
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Linear(2 * COLS, HIDDEN), torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN, COLS),
    )
    # Away from linearity: rows of V are small.
    with torch.no_grad():
        net[0].weight *= 4
    new = []
    for gap in range(LAYERS - 1):
        x = torch.tensor(numpy.concatenate(parts[gap:gap + 2], axis=1), dtype=torch.float32)
        rows = net(x).detach().double().numpy()
        new.append((u * s @ rows).flatten().tolist())
    json.dump({
        "rows": ROWS, "cols": COLS, "hidden": HIDDEN,
        "weights": [w.flatten().tolist() for w in weights],
        "params": [p.detach().flatten().tolist() for p in net.parameters()],
        "new": new,
    }, open(sys.argv[1], "w"))


main()
