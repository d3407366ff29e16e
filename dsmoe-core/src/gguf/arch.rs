//! The architectures of GGUF files that are read.

/// The tensors that llama.cpp takes for the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// `output.weight`, or the embedding where that is absent.
    Either,
    /// `output.weight`, which must be there.
    Own,
    /// The embedding; another tensor is refused.
    Embedding,
}

/// One architecture: how its files differ from Hugging Face's.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arch {
    /// `general.architecture`, and the prefix of its keys.
    pub(crate) name: &'static str,
    /// `model_type` of config.json.
    pub(crate) model_type: &'static str,
    /// The class of transformers.
    pub(crate) class: &'static str,
    /// True if RoPE turns neighbours, so that rows of queries and keys are stored in another order.
    pub(crate) interleaved: bool,
    /// True if weights of norms are stored with 1 added.
    pub(crate) norm_plus_one: bool,
    /// True if a norm follows attention and FFN.
    pub(crate) post_norms: bool,
    /// True if q, k, v are one tensor, and gate and up another.
    pub(crate) fused: bool,
    /// True if attention's output projection and the FFN may have biases. Those of q, k and v are read in every graph.
    pub(crate) other_biases: bool,
    /// True if the divisors of Llama 3's RoPE are read.
    pub(crate) divisors: bool,
    /// True if the heads of queries are read only where they are together as wide as the hidden size.
    pub(crate) square: bool,
    /// The output head.
    pub(crate) head: Head,
}

const LLAMA: Arch = Arch {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    interleaved: true,
    norm_plus_one: false,
    post_norms: false,
    fused: false,
    other_biases: true,
    divisors: true,
    square: false,
    head: Head::Either,
};
const QWEN3: Arch = Arch {
    name: "qwen3",
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    interleaved: false,
    other_biases: false,
    divisors: false,
    ..LLAMA
};
const QWEN2: Arch =
    Arch { name: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", square: true, ..QWEN3 };
const GEMMA: Arch = Arch {
    name: "gemma",
    model_type: "gemma",
    class: "GemmaForCausalLM",
    norm_plus_one: true,
    head: Head::Embedding,
    ..QWEN3
};
const GEMMA2: Arch =
    Arch { name: "gemma2", model_type: "gemma2", class: "Gemma2ForCausalLM", post_norms: true, ..GEMMA };
const OLMO2: Arch = Arch {
    name: "olmo2",
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    post_norms: true,
    head: Head::Own,
    ..QWEN2
};

/// All of them. The first of a name is that of its files; mistral, ministral and olmo3 share a name with another.
const ARCHS: [Arch; 14] = [
    LLAMA,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    Arch {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        head: Head::Either,
        ..GEMMA2
    },
    Arch { name: "phi3", model_type: "phi3", class: "Phi3ForCausalLM", fused: true, ..QWEN2 },
    OLMO2,
    Arch { name: "granite", model_type: "granite", class: "GraniteForCausalLM", ..LLAMA },
    Arch {
        name: "smollm3",
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        other_biases: false,
        divisors: false,
        ..LLAMA
    },
    Arch { name: "mistral3", model_type: "mistral", class: "MistralForCausalLM", ..LLAMA },
    Arch { name: "llama", model_type: "mistral", class: "MistralForCausalLM", ..LLAMA },
    Arch { name: "llama", model_type: "ministral", class: "MinistralForCausalLM", ..LLAMA },
    Arch { name: "olmo2", model_type: "olmo3", class: "Olmo3ForCausalLM", ..OLMO2 },
];

impl Arch {
    /// Returns the architecture of this `general.architecture`.
    pub(crate) fn of(name: &str) -> Option<&'static Arch> {
        ARCHS.iter().find(|arch| arch.name == name)
    }

    /// Returns the architecture as which a model of this `model_type` is written.
    pub(crate) fn of_model_type(model_type: &str) -> Option<&'static Arch> {
        // mistral and ministral are written as llama, as llama.cpp's converter does.
        ARCHS.iter().rfind(|arch| arch.model_type == model_type)
    }

    /// Returns the variant of `model_type` with the name of `self`.
    pub(crate) fn variant(&self, model_type: &str) -> &'static Arch {
        let found = ARCHS.iter().find(|arch| arch.name == self.name && arch.model_type == model_type);
        found.unwrap_or(&LLAMA)
    }

    /// Returns the names that are read, for messages.
    pub(crate) fn names() -> String {
        let names: Vec<&str> = ARCHS.iter().map(|arch| arch.name).take(11).collect();
        names.join(", ")
    }
}
