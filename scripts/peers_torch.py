"""PyTorch's side of scripts/peers: one JSON request per line on stdin, one JSON list of rows per line on stdout.

A request names its work (matmul, ffn, train, decode), its shape, dtype, threads and repeats, as the rows of
`dsmoe bench --json` do. What a request needs is built at its first line and kept for the same request again.
"""

import json
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F

# Of transformers, on stderr, about options that are not used here.
warnings.filterwarnings("ignore")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TINY = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 2, "kv_heads": 2, "vocab": 64, "seq": 8, "batch": 1,
        "experts": 4, "prompt": 2, "tokens": 2}


def seconds(call, repeats):
    """Median seconds of a call."""
    call()
    times = []
    for _ in range(repeats):
        started, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < 0.02:
            call()
            calls += 1
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def status(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def mark():
    """Sets the peak of resident memory to what is resident now, and returns that."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")


def matmul(r):
    x = torch.randn(r["tokens"], r["hidden"]).to(DTYPES[r["dtype"]])
    w = torch.randn(r["intermediate"], r["hidden"]).to(DTYPES[r["dtype"]])
    return {"forward": lambda: F.linear(x, w)}


def ffn(r):
    """dense: all neurons; masked: all neurons, those of inactive experts times 0; loop: expert by expert."""
    tokens, hidden, intermediate, experts = r["tokens"], r["hidden"], r["intermediate"], r["experts"]
    width, dtype, backward = intermediate // experts, DTYPES[r["dtype"]], r["backward"]
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(dtype).requires_grad_(backward)

    x = make(tokens, hidden)
    gate, up, down = make(intermediate, hidden), make(intermediate, hidden), make(hidden, intermediate)
    drawn = torch.rand(tokens, experts, generator=generator)
    # The pairs with the smallest numbers: the share is exact.
    wanted = round(r["active"] * drawn.numel())
    mask = torch.zeros(drawn.numel(), dtype=torch.bool)
    mask[drawn.flatten().argsort()[:wanted]] = True
    mask = mask.view_as(drawn)
    gates = (0.5 + 0.5 * torch.rand(tokens, experts, generator=generator)).to(dtype)
    chosen = [mask[:, expert].nonzero().squeeze(1) for expert in range(experts)]

    def dense():
        return (F.silu(F.linear(x, gate)) * F.linear(x, up)) @ down.t()

    def masked():
        c = (F.silu(F.linear(x, gate)) * F.linear(x, up)).view(tokens, experts, width)
        return (c * (gates * mask)[..., None]).reshape(tokens, intermediate) @ down.t()

    def loop():
        y = torch.zeros(tokens, hidden, dtype=dtype)
        for expert, ids in enumerate(chosen):
            rows, own = slice(expert * width, (expert + 1) * width), x[ids]
            c = F.silu(F.linear(own, gate[rows])) * F.linear(own, up[rows]) * gates[ids, expert, None]
            y = y.index_add(0, ids, c @ down[:, rows].t())
        return y

    def training(forward):
        def call():
            forward().sum().backward()
        return call

    runs = {"dense": dense, "masked": masked, "loop": loop}
    return {name: training(run) for name, run in runs.items()} if backward else runs


class MaskedExperts(torch.nn.Module):
    """A LLaMA FFN with DSMoE's gates, as it is written in PyTorch: the mask multiplies, nothing is skipped."""

    def __init__(self, mlp, experts, active):
        super().__init__()
        self.mlp, self.experts = mlp, experts
        self.router = torch.nn.Linear(mlp.gate_proj.in_features, experts)
        # Standard normal logits of normed inputs: the share of them above the bias is what was asked for.
        torch.nn.init.normal_(self.router.weight, std=mlp.gate_proj.in_features ** -0.5)
        shift = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(active).clamp(1e-6, 1 - 1e-6))
        torch.nn.init.constant_(self.router.bias, shift.item())

    def forward(self, x):
        gates = torch.sigmoid(self.router(x))
        # Forward the gates above the threshold, backward all of them (eq. 10).
        values = gates - (gates * (gates <= 0.5)).detach()
        c = F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        c = c.unflatten(-1, (self.experts, -1)) * values[..., None]
        return self.mlp.down_proj(c.flatten(-2))


def llama(r, dtype, masked):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=r["hidden"],
        intermediate_size=r["intermediate"],
        num_hidden_layers=r["layers"],
        num_attention_heads=r["heads"],
        num_key_value_heads=r["kv_heads"],
        vocab_size=r["vocab"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if masked:
        for layer in model.model.layers:
            layer.mlp = MaskedExperts(layer.mlp, r["experts"], r["active"])
    return model.to(dtype)


def train(r):
    """One implementation per request: the memory of one must not hide that of the other."""
    model = llama(r, torch.float32, r["impl"] == "masked").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    ids = torch.randint(0, r["vocab"], (r["batch"], r["seq"]))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=r["dtype"] == "bf16"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {r["impl"]: step}


def decode(r):
    model = llama(r, DTYPES[r["dtype"]], False).eval()
    ids = torch.randint(0, r["vocab"], (1, r["prompt"]))

    def generate(tokens):
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def timed():
        started = time.perf_counter()
        generate(1)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        generate(r["tokens"] + 1)
        return time.perf_counter() - started - prefill

    return {"transformers": timed}


def answer(r, calls, before):
    torch.set_num_threads(r["threads"])
    rows = []
    for name, call in calls.items():
        with torch.set_grad_enabled(r["work"] == "train" or r.get("backward", False)):
            if r["work"] == "decode":
                call()
                took = statistics.median(call() for _ in range(r["repeats"]))
            else:
                took = seconds(call, r["repeats"])
        row = {**r, "peer": "torch", "impl": name, "seconds": took}
        if r["work"] in ("train", "decode"):
            tokens = r["tokens"] if r["work"] == "decode" else r["batch"] * r["seq"]
            row["tokens_per_s"] = tokens / took
            row["peak_memory_bytes"] = status("VmHWM") - before
        rows.append(row)
    return rows


def main():
    versions = {"torch": torch.__version__}
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        versions["transformers"] = transformers.__version__
    except ImportError:
        pass
    print(json.dumps(versions), flush=True)
    known, calls, before = None, None, 0
    for line in sys.stdin:
        r = json.loads(line)
        if r != known:
            torch.set_num_threads(r["threads"])
            calls = None
            if r["work"] in ("train", "decode"):
                # What is loaded at the first use of anything is no memory of the work.
                for call in globals()[r["work"]]({**r, **TINY}).values():
                    call()
            before = mark()
            known, calls = r, globals()[r["work"]](r)
        print(json.dumps(answer(r, calls, before)), flush=True)


main()
