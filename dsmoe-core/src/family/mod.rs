//! The families of decoders that are read and trained: one table, and one file per family.
//!
//! A family says what its config.json leaves unsaid and which switches ([`Architecture`]) its models set. The passes know the
//! switches alone. Everything in `config.json` that changes a model's function and is not a switch here is refused.
//!
//! [`Architecture`]: crate::config::Architecture

mod gemma;
mod granite;
mod llama;
mod mistral;
mod mixtral;
pub(crate) mod mixture;
mod olmo;
mod olmoe;
mod phi3;
mod qwen;
mod qwen_moe;
mod smollm3;
pub(crate) mod spec;

pub use spec::Family;

/// All families.
static FAMILIES: [&Family; 17] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mistral::MINISTRAL,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &smollm3::SMOLLM3,
    &phi3::PHI3,
    &olmo::OLMO2,
    &olmo::OLMO3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3_TEXT,
    &granite::GRANITE,
    &mixtral::MIXTRAL,
    &qwen_moe::QWEN2_MOE,
    &qwen_moe::QWEN3_MOE,
    &olmoe::OLMOE,
];

/// Model types that are known and not supported, where `*` stands for any end, and the reason.
const REFUSED: [(&str, &str); 28] = [
    ("llama4*", "all models of Llama 4 are mixtures of experts of another kind"),
    ("phimoe", EXPERTS),
    ("granitemoe*", EXPERTS),
    ("deepseek*", EXPERTS),
    ("gpt_oss", EXPERTS),
    ("gemma3n*", "its layers have inputs of their own"),
    ("gemma4*", "its layers have inputs of their own"),
    ("ministral3", "a factor of its queries grows with the position"),
    ("llava*", IMAGES),
    ("paligemma*", IMAGES),
    ("qwen2_vl*", IMAGES),
    ("qwen2_5_vl*", IMAGES),
    ("qwen3_vl*", IMAGES),
    ("smolvlm*", IMAGES),
    ("idefics*", IMAGES),
    ("internvl*", IMAGES),
    ("qwen3_next", "it has linear attention"),
    ("qwen3_5*", "it has linear attention"),
    ("phi", UNGATED),
    ("gpt_neox", UNGATED),
    ("gpt_neo", UNGATED),
    ("gptj", UNGATED),
    ("gpt2", UNGATED),
    ("falcon", UNGATED),
    ("opt", UNGATED),
    ("starcoder2", UNGATED),
    ("stablelm", "it has LayerNorm"),
    ("olmo", "it has LayerNorm"),
];

const EXPERTS: &str = "it is a mixture of experts of another kind";
const IMAGES: &str = "it reads images, too";
const UNGATED: &str = "its FFN has no gate";

/// Returns the family of that `model_type`.
pub fn find(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.model_type == model_type)
}

/// Returns all families.
pub fn all() -> impl ExactSizeIterator<Item = &'static Family> {
    FAMILIES.iter().copied()
}

/// Returns why a known `model_type` is not supported.
pub(crate) fn reason_against(model_type: &str) -> Option<&'static str> {
    let is = |name: &str| match name.strip_suffix('*') {
        Some(start) => model_type.starts_with(start),
        None => model_type == name,
    };
    REFUSED.iter().find(|(name, _)| is(name)).map(|(_, reason)| *reason)
}
