"""Sparse models made by dsmoe on transformers: the decoder of the base family with another FFN in every layer.

    q = sigmoid(W x + b)                         gates, one per expert
    a = q > threshold                            active experts
    y = sum over active i of c s_i o_i(x)        s_i = q_i or 1, c = 1 or experts / active experts

The leading experts of a layer may be a core, which always runs and has no gate; routers may have a low rank, and a
linear term may be added to y. Expert i is the i-th block of neurons of `gate_proj`, `up_proj` and `down_proj`. FFNs of type `topk` run a fixed number
of experts per token in place of the gates. Attention, caches and generation are those of transformers. The file needs
torch and transformers alone.
"""

import copy
import functools
import math
import struct

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers.activations import ACT2FN

from .configuration_dsmoe import DsmoeConfig

# Numbers of tokens up to which a device other than the CPU gathers the weights of active experts.
MOST_GATHERED = 4
PATHS = ("auto", "dense", "gather", "loop")


def one_of(settings, key, allowed):
    """Returns a setting after checking that this file implements its value."""
    value = settings[key]
    if value not in allowed:
        raise ValueError(f"config.json: {key} is {value!r}; this code implements {', '.join(map(str, allowed))}")
    return value


def as_f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def activation(config):
    # Early files of Gemma say gelu and mean its tanh form; no family here uses the other.
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu" else name]


def wide_dtype():
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class Router(nn.Linear):
    """A linear map in f32 or wider in any model: rounded logits would select other experts."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias, dtype=wide_dtype())

    def forward(self, x):
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), bias)


class DenseMLP(nn.Module):
    """The gated FFN, all neurons of which run."""

    def __init__(self, config):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = activation(config)
        # The mean of what neurons added that were removed.
        self.output_bias = nn.Parameter(torch.zeros(hidden)) if getattr(config, "output_bias", False) else None

    def forward(self, hidden_states):
        y = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.with_output_bias(y)

    def with_output_bias(self, y):
        return y if self.output_bias is None else y + self.output_bias


class ExpertMLP(DenseMLP):
    """The FFN as experts; a subclass routes."""

    # Parts of the names of f32 tensors.
    router_names = ()
    # The leading experts that every token runs with the factor 1.
    core = 0

    def __init__(self, config, of_layer, num_experts):
        super().__init__(of_layer)
        if of_layer.intermediate_size % num_experts:
            raise ValueError(f"config.json: {num_experts} experts do not divide {of_layer.intermediate_size} neurons")
        self.config = config
        self.num_experts = num_experts
        # The share of the layer in the auxiliary loss, set by a forward pass in training.
        self.auxiliary_loss = None
        # Active pairs and all pairs of a token and an expert, counted in evaluation.
        self.active_pairs, self.all_pairs = None, 0

    def route(self, x):
        """Returns which experts run for each token, and the factors of their outputs, both [tokens, experts]."""
        raise NotImplementedError

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        active, factors = self.route(x)
        if not self.training and not torch.compiler.is_compiling():
            pairs = active.detach().sum()
            self.active_pairs = pairs if self.active_pairs is None else self.active_pairs + pairs
            self.all_pairs += active.numel()
        run = {"dense": self.run_dense, "gather": self.run_gathered, "loop": self.run_looped}[self.path(x)]
        return self.with_output_bias(self.corrected(run(x, active, factors), x)).view_as(hidden_states)

    def corrected(self, y, x):
        """Returns the output with what a subclass adds to it."""
        return y

    def path(self, x):
        path = getattr(self.config, "dsmoe_path", "auto")
        if path not in PATHS:
            raise ValueError(f"config.dsmoe_path is {path!r}; use one of {', '.join(PATHS)}")
        # Gradients of gates need the outputs of all experts, and a compiled graph needs fixed shapes.
        if self.training or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return "dense"
        # A wrapped, quantised or offloaded projection has to be called; its weight is not the whole of it.
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if type(projection) is not nn.Linear or projection.weight.device != x.device:
                return "dense"
        if path != "auto":
            return path
        return "gather" if x.device.type != "cpu" and x.shape[0] <= MOST_GATHERED else "loop"

    def run_dense(self, x, active, factors):
        """Runs every expert and multiplies by the factors, 0 for inactive ones."""
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h = h.unflatten(-1, (self.num_experts, -1)) * factors[..., None].to(h.dtype)
        return self.down_proj(h.flatten(-2))

    def expert_weights(self):
        """Returns the projections as views [experts, width, hidden] and, down, [experts, hidden, width], with biases."""
        n = self.num_experts
        gate, up = (projection.weight.unflatten(0, (n, -1)) for projection in (self.gate_proj, self.up_proj))
        down = self.down_proj.weight.unflatten(1, (n, -1)).transpose(0, 1)
        biases = (projection.bias for projection in (self.gate_proj, self.up_proj))
        return gate, up, down, [None if bias is None else bias.unflatten(0, (n, -1)) for bias in biases]

    def run_core(self, x):
        """Returns the output of the core, without the bias of the down projection; none without a core."""
        if not self.core:
            return None
        neurons = self.core * (self.gate_proj.weight.shape[0] // self.num_experts)
        biases = (projection.bias for projection in (self.gate_proj, self.up_proj))
        gate_bias, up_bias = (None if bias is None else bias[:neurons] for bias in biases)
        gate = F.linear(x, self.gate_proj.weight[:neurons], gate_bias)
        up = F.linear(x, self.up_proj.weight[:neurons], up_bias)
        return F.linear(self.act_fn(gate) * up, self.down_proj.weight[:, :neurons])

    def with_down_bias(self, y):
        return y if self.down_proj.bias is None else y + self.down_proj.bias

    def run_gathered(self, x, active, factors):
        """Copies the weights of all active pairs and multiplies them at once: few kernels, for few tokens."""
        gate, up, down, (gate_bias, up_bias) = self.expert_weights()
        tokens, experts = active[:, self.core :].nonzero(as_tuple=True)
        experts = experts + self.core
        rows = x[tokens].unsqueeze(-1)
        g, u = (gate[experts] @ rows).squeeze(-1), (up[experts] @ rows).squeeze(-1)
        if gate_bias is not None:
            g, u = g + gate_bias[experts], u + up_bias[experts]
        h = self.act_fn(g) * u * factors[tokens, experts, None].to(x.dtype)
        o = (down[experts] @ h.unsqueeze(-1)).squeeze(-1)
        # A product with zeros and ones adds the outputs of a token in one order on every device.
        of_token = tokens == torch.arange(x.shape[0], device=x.device)[:, None]
        y, core = of_token.to(o.dtype) @ o, self.run_core(x)
        return self.with_down_bias(y if core is None else y + core)

    def run_looped(self, x, active, factors):
        """Multiplies the tokens of each expert by views of its weights."""
        gate, up, down, (gate_bias, up_bias) = self.expert_weights()
        core = self.run_core(x)
        y = torch.zeros_like(x) if core is None else core
        routed = active[:, self.core :]
        tokens_by_expert = routed.T.nonzero(as_tuple=True)[1].split(routed.sum(0).tolist())
        for i, tokens in enumerate(tokens_by_expert, self.core):
            if tokens.numel():
                rows = x[tokens]
                g = F.linear(rows, gate[i], None if gate_bias is None else gate_bias[i])
                u = F.linear(rows, up[i], None if up_bias is None else up_bias[i])
                h = self.act_fn(g) * u * factors[tokens, i, None].to(x.dtype)
                y.index_add_(0, tokens, F.linear(h, down[i]))
        return self.with_down_bias(y)


class LowRankRouter(nn.Module):
    """A router whose logits are a linear map of a few values, which are a linear map of the input."""

    def __init__(self, inputs, rank, outputs, bias):
        super().__init__()
        self.a, self.b = Router(inputs, rank), Router(rank, outputs)
        if bias:
            self.bias = nn.Parameter(torch.zeros(outputs, dtype=self.b.weight.dtype))

    def forward(self, x):
        """Returns the logits, and the values between both maps."""
        low = self.a(x)
        logits = self.b(low)
        return logits + self.bias if hasattr(self, "bias") else logits, low


def threshold_logits(settings, layers):
    """Returns what the logits of every layer have to exceed: those of the budget `active_target`, mixed linearly
    between two stored ones; none without budgets."""
    budgets = settings.get("budgets")
    if not budgets:
        return None
    active = settings["active_target"]
    if not budgets[0]["active"] <= active <= budgets[-1]["active"]:
        raise ValueError(
            f"config.json: active_target is {active}; use {budgets[0]['active']} to {budgets[-1]['active']}"
        )
    above = next(i for i, budget in enumerate(budgets) if budget["active"] >= active)
    low, high = budgets[max(above - 1, 0)], budgets[above]
    logits = [as_f32(logit) for logit in high["thresholds"]]
    if high["active"] != active:
        part = as_f32((active - low["active"]) / (high["active"] - low["active"]))
        starts = [as_f32(logit) for logit in low["thresholds"]]
        logits = [as_f32(start + as_f32(part * as_f32(logit - start))) for start, logit in zip(starts, logits)]
    if len(logits) != layers:
        raise ValueError(f"config.json: a budget has {len(logits)} thresholds for {layers} layers")
    return logits


class DsmoeMLP(ExpertMLP):
    """DSMoE's FFN: every token runs the core and the experts whose gate is above the threshold."""

    def __init__(self, config, of_layer, index):
        settings = config.dsmoe
        super().__init__(config, of_layer, settings["num_experts"])
        one_of(settings, "format_version", (1, 2))
        core = settings.get("core") or 0
        self.core = core[index] if isinstance(core, list) else core
        self.num_routed = self.num_experts - self.core
        self.binary = one_of(settings, "gate_value", ("sigmoid", "binary")) == "binary"
        self.rescale = one_of(settings, "rescale", ("none", "eq8")) == "eq8"
        self.force_argmax = one_of(settings, "zero_active", ("skip", "force_argmax")) == "force_argmax"
        self.straight_through = settings["ste"]
        # Logits are compared, not gates, with the logit of the threshold as f32.
        threshold = as_f32(settings["threshold"])
        self.all_open = threshold == 0.0
        self.threshold_logit = math.log(threshold / (1.0 - threshold)) if 0.0 < threshold < 1.0 else math.inf
        logits = threshold_logits(settings, config.num_hidden_layers)
        if logits is not None:
            self.all_open, self.threshold_logit = False, logits[index]
        hidden, rank, bias = of_layer.hidden_size, settings.get("router_rank"), settings["router_bias"]
        self.low_rank = rank is not None
        if self.low_rank:
            self.router = LowRankRouter(hidden, rank, self.num_routed, bias)
        else:
            self.router = Router(hidden, self.num_routed, bias=bias)
        self.router_names = ["router"]
        if settings.get("correction"):
            self.correction = Router(rank, hidden)
            self.router_names.append("correction")
        if one_of(settings, "partition", ("contiguous", "permuted")) == "permuted":
            # The original index of every neuron, for tools that restore the dense order.
            self.register_buffer("partition", torch.zeros(of_layer.intermediate_size, dtype=torch.int32))

    def corrected(self, y, x):
        return y + self.correction(self.router.a(x)).to(y.dtype) if hasattr(self, "correction") else y

    def route(self, x):
        logits = self.router(x)[0] if self.low_rank else self.router(x)
        gates = logits.sigmoid()
        active = torch.ones_like(logits, dtype=torch.bool) if self.all_open else logits > self.threshold_logit
        if self.force_argmax:
            largest = F.one_hot(logits.argmax(-1), self.num_routed).bool()
            active = active | (largest & ~active.any(-1, keepdim=True))
        factors = active.to(gates.dtype) if self.binary else gates * active
        if self.straight_through:
            # The value stays, and the derivative by every gate becomes 1, also by inactive ones.
            factors = factors.detach() + (gates - gates.detach())
        if self.rescale:
            factors = factors * (self.num_routed / active.sum(-1, keepdim=True).clamp(min=1).to(factors.dtype))
        weight = getattr(self.config, "dsmoe_sparsity_weight", 0.0) if self.training else 0.0
        self.auxiliary_loss = weight * (gates * active).mean() / self.config.num_hidden_layers if weight else None
        always = (self.core, 0)
        return F.pad(active, always, value=True), F.pad(factors, always, value=1.0)


class NeuronGate(nn.Module):
    """The magnitude of one neuron for each expert (CMoE)."""

    def __init__(self, hidden, num_experts):
        super().__init__()
        self.gate, self.up = Router(hidden, num_experts), Router(hidden, num_experts)

    def forward(self, x):
        return (F.silu(self.gate(x)) * self.up(x)).abs()


class TopkGate(nn.Module):
    """Logits of a top-k FFN, under the tensor names of LLaMA-MoE."""

    def __init__(self, hidden, num_experts, settings):
        super().__init__()
        self.normalize, self.noise = settings["normalize"], settings["noise"]
        network, bias = one_of(settings, "gate", ("linear", "mlp", "neuron")), settings.get("bias", False)
        # The first matrix of an mlp keeps its rows where experts were dropped.
        rows = settings.get("gate_hidden") or num_experts
        self.gate_network = Router(hidden, rows, bias=bias)
        if network == "mlp":
            self.gate_network = nn.Sequential(self.gate_network, nn.Tanh(), Router(rows, num_experts))
        if network == "neuron":
            self.gate_network = NeuronGate(hidden, num_experts)
        if self.noise:
            self.weight_noise = Router(hidden, num_experts)

    def forward(self, x):
        """Returns the logits and the standard deviation of their noise, none outside of training."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = F.normalize(wide, dim=-1, eps=torch.finfo(wide.dtype).tiny) if self.normalize else wide
        std = F.softplus(self.weight_noise(wide)) + 0.01 if self.noise and self.training else None
        return self.gate_network(scaled), std


class TopkMLP(ExpertMLP):
    """The FFN of LLaMA-MoE, MoEfication and the random split: every token runs k experts and the residual ones."""

    def __init__(self, config, of_layer):
        settings = config.ffn
        one_of(settings, "type", ("topk",))
        super().__init__(config, of_layer, settings["num_experts"] + settings["num_residual"])
        self.num_routed, self.num_residual, self.top_k = (
            settings[key] for key in ("num_experts", "num_residual", "top_k")
        )
        self.softmax = one_of(settings, "scores", ("softmax", "one")) == "softmax"
        self.score_scale, self.balance_weight = settings["score_scale"], settings["balance_weight"]
        self.gate = TopkGate(of_layer.hidden_size, self.num_routed, settings)
        self.router_names = ("gate_network", "weight_noise") if self.gate.noise else ("gate_network",)

    def route(self, x):
        logits, std = self.gate(x)
        noisy = logits if std is None else logits + std * torch.randn_like(std)
        # A stable order selects the expert with the lower index among equals.
        values, order = noisy.sort(dim=-1, descending=True, stable=True)
        chosen = order[:, : self.top_k]
        scores = values[:, : self.top_k].softmax(-1) if self.softmax else torch.ones_like(values[:, : self.top_k])
        scores = torch.zeros_like(noisy).scatter(-1, chosen, scores)
        active = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, chosen, True)
        weight = self.balance_weight if self.training else 0.0
        self.auxiliary_loss = weight * self.balance_loss(logits, std, values, active, scores) if weight else None
        always = (0, self.num_residual)
        return F.pad(active, always, value=True), F.pad(self.score_scale * scores, always, value=1.0)

    def balance_loss(self, logits, std, values, active, scores):
        """Returns the squared variation of the experts' summed scores plus that of their loads."""
        load = active.to(scores.dtype)
        if std is not None and self.top_k < self.num_routed:
            # The probability to be selected when the noise of this expert is drawn again.
            bar = torch.where(active, values[:, self.top_k, None], values[:, self.top_k - 1, None])
            load = torch.special.ndtr((logits - bar) / std)
        variation = lambda v: v.var() / (v.mean() ** 2 + 1e-10) if v.numel() > 1 else v.sum() * 0.0
        return variation(scores.sum(0)) + variation(load.sum(0))


def config_of_layer(config, index):
    """Returns the configuration with the sizes of one layer."""
    shapes = getattr(config, "layer_shapes", None)
    if not shapes:
        return config
    of_layer = copy.copy(config)
    head_dim = getattr(config, "head_dim", None)
    of_layer.head_dim = head_dim or config.hidden_size // config.num_attention_heads
    for key, value in shapes[index].items():
        setattr(of_layer, key, value)
    return of_layer


def make_mlp(config, of_layer, index):
    if getattr(config, "dsmoe", None):
        return DsmoeMLP(config, of_layer, index)
    if getattr(config, "ffn", None):
        return TopkMLP(config, of_layer)
    return DenseMLP(of_layer)


def split_joined_projection(attention):
    """Stores queries, keys and values of a family that joins them as three projections, as the checkpoint does."""
    joined = getattr(attention, "qkv_proj", None)
    if joined is None:
        return
    key_width = attention.num_key_value_heads * attention.head_dim
    del attention.qkv_proj
    for name, width in (
        ("q_proj", joined.out_features - 2 * key_width),
        ("k_proj", key_width),
        ("v_proj", key_width),
    ):
        setattr(attention, name, nn.Linear(joined.in_features, width, bias=joined.bias is not None))

    def qkv_proj(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    attention.__class__ = type("Split" + type(attention).__name__, (type(attention),), {"qkv_proj": qkv_proj})


class DsmoeForCausalLM(BaseForCausalLM):
    config_class = DsmoeConfig

    def __init__(self, config):
        super().__init__(config)
        layers = self.model.layers
        for index in range(len(layers)):
            of_layer = config_of_layer(config, index)
            if of_layer is not config:
                layers[index] = type(layers[index])(of_layer, layer_idx=index)
            layers[index].mlp = make_mlp(config, of_layer, index)
            split_joined_projection(layers[index].self_attn)
        # On the instance, since releases before 5 check the names before the FFNs are in place.
        names = {name for mlp in self.expert_mlps() for name in mlp.router_names}
        self._keep_in_fp32_modules_strict = names
        self.post_init()

    def expert_mlps(self):
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, ExpertMLP)]

    @functools.wraps(BaseForCausalLM.forward)
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if not self.training:
            return outputs
        losses = [mlp.auxiliary_loss for mlp in self.expert_mlps() if mlp.auxiliary_loss is not None]
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        if not losses or loss is None or loss.dim() > 0:
            return outputs
        if torch.is_grad_enabled() and not all(loss.requires_grad for loss in losses):
            raise ValueError(
                "the auxiliary loss of the experts has no gradient; with gradient checkpointing give "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set dsmoe_sparsity_weight to 0"
            )
        loss = loss + sum(auxiliary.to(loss.device) for auxiliary in losses)
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs.loss = loss
        return outputs

    def active_share(self, reset=True):
        """Returns the mean share of experts that ran in evaluation since the last reset; none if nothing ran.

        Compiled passes are not counted.
        """
        mlps = self.expert_mlps()
        pairs = sum(mlp.all_pairs for mlp in mlps)
        active = sum(int(mlp.active_pairs) for mlp in mlps if mlp.active_pairs is not None)
        if reset:
            for mlp in mlps:
                mlp.active_pairs, mlp.all_pairs = None, 0
        return active / pairs if pairs else None


DsmoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
