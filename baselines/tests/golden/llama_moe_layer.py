"""A LLaMA-MoE layer in PyTorch, float64: output, balance loss, and the gradients of <y, dy> + balance loss.

python llama_moe_layer.py > llama_moe_layer.json      (made with torch 2.15)
"""

import json

import torch

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K, RESIDUAL, BALANCE = 7, 6, 20, 4, 2, 1, 0.05
generator = torch.Generator().manual_seed(11)


def normal(*shape, scale=1.0):
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    # As f32 has them, so that both sides compute of the same numbers.
    return values.float().double().requires_grad_()


def cv_squared(x):
    return x.var() / (x.mean() ** 2 + 1e-10)


x, dy = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN).detach()
gate, up, down = [normal(WIDTH, HIDDEN, scale=0.5) for _ in range(3)]
first, second = normal(EXPERTS, HIDDEN), normal(EXPERTS, EXPERTS)

logits = torch.tanh(x @ first.T) @ second.T
top, indices = logits.topk(TOP_K, dim=1)
scores = torch.zeros_like(logits).scatter(1, indices, top.softmax(dim=1))
load = (scores > 0).sum(0).double()
balance = BALANCE * (cv_squared(scores.sum(0)) + cv_squared(load))
neurons = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
width = WIDTH // (EXPERTS + RESIDUAL)
y = torch.zeros_like(x)
for e in range(EXPERTS + RESIDUAL):
    part = slice(e * width, (e + 1) * width)
    weight = EXPERTS / TOP_K * scores[:, e : e + 1] if e < EXPERTS else 1.0
    y = y + weight * (neurons[:, part] @ down[part])
((y * dy).sum() + balance).backward()

named = {"x": x, "dy": dy, "gate": gate, "up": up, "down": down, "first": first, "second": second, "y": y}
golden = {name: value.detach().flatten().tolist() for name, value in named.items()}
golden["balance"] = balance.item()
for name in ["x", "gate", "up", "down", "first", "second"]:
    golden["d" + name] = named[name].grad.flatten().tolist()
print(json.dumps({k: v if isinstance(v, float) else [float(f"{a:.10g}") for a in v] for k, v in golden.items()}))
