//! Every method, from a dense directory to the model that it makes.

mod common;
mod duo;
mod duo_budget;
mod llama_moe_golden;
mod llm_pruner;
mod mapped;
mod neurons;
mod sparse;
mod start;
mod surgery;
mod thresholds;
mod topk;
mod trained_router;
