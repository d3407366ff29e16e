#!/usr/bin/env python3
"""Times the step that dominates LLM-Pruner, LLaMA-MoE and MoEfication beside the same library calls as their official code.

Each step is implemented here from its description; the file of the official repository is named with it. The two sides take
turns; the least of --rounds counts. Ours is the whole command, less the same command without the step (another construction, or
few samples). Besides wall time the CPU time of all threads is given, which other work on the machine disturbs less (that of
KMeansConstrained's worker processes, which it has with --threads above 1, is not in it).
Needs torch, transformers, tokenizers, scikit-learn, k-means-constrained, and the dsmoe command.

  python scripts/peers_methods.py --model MODEL --calib TEXT.txt --dsmoe target/release/dsmoe [--only clustering]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
import torch
from k_means_constrained import KMeansConstrained
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="small dense LLaMA directory with tokenizer.json")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--dsmoe", default="dsmoe", help="the command [default: dsmoe]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=2048, help="rows to cluster [default: 2048]")
    parser.add_argument("--hidden", type=int, default=512, help="their width [default: 512]")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1, help="layers to cluster [default: 1]")
    parser.add_argument("--starts", type=int, help="of KMeansConstrained [default: its own, 10]")
    parser.add_argument("--only", metavar="STEP,...", default="clustering,taylor,gradients")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {"clustering": clustering, "taylor": taylor, "gradients": gradients}
    print("| step | theirs, s (CPU s) | ours, s (CPU s) | result |\n| --- | --- | --- | --- |")
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as work:
            print(steps[name](options, Path(work)), flush=True)


def timed(call):
    """What a call returns, its wall seconds and the CPU seconds of this process and its ended children."""
    def cpu():
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    wall, used = time.perf_counter(), cpu()
    value = call()
    return value, np.array([time.perf_counter() - wall, cpu() - used])


def dsmoe(options, model, out, *args):
    command = [options.dsmoe, "prune", model, "--out", out, "--force", "--threads", options.threads, "--quiet", "--json", *args]
    done = subprocess.run([str(arg) for arg in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stdout.strip()}")


def turns(options, theirs, ours, without):
    """The last values of both sides, and a table row's cells of their times."""
    times = {"theirs": [], "ours": [], "without": []}
    values = {}
    for _ in range(options.rounds):
        for name, call in (("theirs", theirs), ("ours", ours), ("without", without)):
            values[name], took = timed(call)
            times[name].append(took)
    least = {name: np.min(took, axis=0) for name, took in times.items()}
    step = least["ours"] - least["without"]
    print(json.dumps({name: np.round(took, 3).tolist() for name, took in times.items()}), file=sys.stderr)
    return values, f"{least['theirs'][0]:.2f} ({least['theirs'][1]:.2f}) | {step[0]:.2f} ({step[1]:.2f})"


def clustering(options, work):
    """Balanced k-means of rows of length 1: moefication/utils.py (ParamSplit), smoe/utils/expert_construction/expert_split.py
    (ClusteringSplit), which also asks for 500 iterations and all threads."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=options.hidden, intermediate_size=options.neurons, num_hidden_layers=options.layers,
                         num_attention_heads=8, num_key_value_heads=8, vocab_size=64, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(work / "model")
    model = LlamaForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    rows = [normalize(layer.mlp.up_proj.weight.detach().numpy()) for layer in model.model.layers]
    size = options.neurons // options.experts
    starts = {} if options.starts is None else {"n_init": options.starts}

    def theirs():
        # Without memory maps, which are read only, and which k-means-constrained 0.9.1 refuses.
        with joblib.parallel_config(max_nbytes=None):
            return fit()

    def fit():
        fits = [KMeansConstrained(n_clusters=options.experts, size_min=size, size_max=size, max_iter=500, random_state=0,
                                  n_jobs=options.threads, **starts).fit(x) for x in rows]
        return sum(inertia(x, fit.labels_) for x, fit in zip(rows, fits))

    common = ["--method", "llama-moe", "--budget", 1.0, "--set", f"experts={options.experts}"]

    def ours():
        dsmoe(options, work / "model", work / "out", *common, "--set", "construction=clustering")
        layers = json.loads((work / "out" / "experts.json").read_text())
        layers = layers["layers"] if isinstance(layers, dict) else layers
        total = 0
        for x, experts in zip(rows, layers):
            labels = np.empty(options.neurons, int)
            for expert, neurons in enumerate(experts):
                labels[neurons] = expert
            assert all(len(neurons) == size for neurons in experts)
            total += inertia(x, labels)
        return total

    values, cells = turns(options, theirs, ours, lambda: dsmoe(options, work / "model", work / "out", *common))
    shape = f"{options.layers} x {options.neurons} rows of {options.hidden}, {options.experts} clusters"
    return f"| balanced k-means, {shape} | {cells} | inertia {values['theirs']:.2f}, ours {values['ours']:.2f} |"


def inertia(x, labels):
    return sum(np.square(x[labels == c] - x[labels == c].mean(0)).sum(dtype=np.float64) for c in np.unique(labels))


def calibration(options):
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokenizer.no_truncation()
    # Enough characters for the samples, whatever the tokenizer.
    text = options.calib.read_text(encoding="utf-8")[: 16 * options.samples * options.seq]
    ids = tokenizer.encode(text).ids[: options.samples * options.seq]
    return torch.tensor(ids).view(options.samples, options.seq)


def calibrated(options, theirs, work, *args):
    common = ["--calib", options.calib, "--seq", options.seq, *args]
    few = options.experts
    ours = lambda: dsmoe(options, options.model, work / "out", *common, "--samples", options.samples)
    without = lambda: dsmoe(options, options.model, work / "out", *common, "--samples", few)
    _, cells = turns(options, theirs, ours, without)
    return f"{cells} | {options.samples} samples of {options.seq} tokens, ours {options.samples} less {few}, so x {options.samples / (options.samples - few):.2f} |"


def taylor(options, work):
    """First-order Taylor importance: one backward of all samples, then |w dw| summed over rows: llama3.py (block_wise),
    LLMPruner/pruner/hf_llama_pruner.py (TaylorImportance)."""
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = calibration(options)

    def theirs():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [(p * p.grad).abs().sum(-1).detach() for p in model.parameters()]

    cells = calibrated(options, theirs, work, "--method", "llm-pruner-block", "--budget", "0.8")
    return f"| LLM-Pruner's Taylor importance | {cells}"


def gradients(options, work):
    """|h dL/dh| of every neuron, a sample at a time, by hooks of the down projections: GradientSplitGetGrads in
    smoe/utils/expert_construction/expert_split.py, feature_change with kernel l1."""
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = calibration(options)
    values, scores = {}, {}

    def forward(module, inputs, _):
        values[module] = inputs[0].detach()

    def backward(module, grad_in, _):
        scores[module] = scores.get(module, 0) + (grad_in[0] * values[module]).abs().flatten(0, -2).sum(0)

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(forward)
        layer.mlp.down_proj.register_full_backward_hook(backward)

    def theirs():
        scores.clear()
        for sample in ids:
            model.zero_grad()
            model(sample[None], labels=sample[None]).loss.backward()
        return scores

    cells = calibrated(options, theirs, work, "--method", "llama-moe", "--set", "construction=sharing-inner",
                       "--set", f"experts={options.experts}", "--budget", "0.8")
    return f"| LLaMA-MoE's importance of neurons | {cells}"


if __name__ == "__main__":
    main()
