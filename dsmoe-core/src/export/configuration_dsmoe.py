"""Configuration of sparse models made by dsmoe, for transformers 4.46 and later.

It is the configuration of the base family with up to three more objects: `dsmoe` (DSMoE's experts and gates), `ffn`
(an FFN of another method) and `layer_shapes` (sizes of every layer, where they differ). Two more keys are read when
they are there: `dsmoe_path` (auto, dense, gather or loop: how experts run) and `dsmoe_sparsity_weight` (weight of the
sparsity loss in training).
"""

from transformers import LlamaConfig as BaseConfig


def legacy_rope(parameters, family):
    """Returns the keys by which transformers 4 reads the object `rope_parameters` of transformers 5."""
    full = parameters.get("full_attention") or parameters
    scaled = full.get("rope_type", "default") != "default"
    keys = {
        "rope_theta": full.get("rope_theta"),
        "rope_scaling": {key: value for key, value in full.items() if key != "rope_theta"} if scaled else None,
    }
    if family == "gemma3_text" and parameters.get("sliding_attention"):
        keys["rope_local_base_freq"] = parameters["sliding_attention"].get("rope_theta")
    return keys


class DsmoeConfig(BaseConfig):
    model_type = "dsmoe"
    # A plan for dense FFNs would cut the projections across experts.
    base_model_tp_plan = None

    def validate(self):
        """Runs the checks of transformers 5, but for one that refuses heads that do not divide the hidden size.

        A pruned model has such heads and states `head_dim`.
        """
        for check in getattr(type(self), "__class_validators__", ()):
            if check.__name__ != "validate_architecture":
                check(self)

    def to_dict(self):
        output = super().to_dict()
        # Transformers 5 keeps one spelling of the rotary embedding, and transformers 4 does not read it.
        if output.get("rope_parameters") and "rope_scaling" not in output:
            output.update(legacy_rope(output["rope_parameters"], BaseConfig.model_type))
        # Weights that pass through Python may have changed.
        if isinstance(output.get("dsmoe"), dict):
            output["dsmoe"].pop("untrained", None)
        return output


DsmoeConfig.register_for_auto_class()
