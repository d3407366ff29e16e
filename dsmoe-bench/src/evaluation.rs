//! Perplexity measurements with progress.

use anyhow::{Result, bail};
use dsmoe_core::Inference;
use dsmoe_kernels::comm::{Alone, Communicator};
use dsmoe_train::eval::{Domain, DomainReport, EvalOptions, EvalReport, UsedShares, evaluate_domains_on};

use crate::format::{self, Table};
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Evaluates with progress.
pub(crate) fn measure(model: &Inference, ids: &[u32], options: EvalOptions, ui: &Ui) -> Result<EvalReport> {
    measure_on(&Alone, model, &[Domain { name: "", weight: 1.0, ids }], options, ui)
}

/// Evaluates texts with progress, on the processes of `comm`.
pub(crate) fn measure_on(
    comm: &dyn Communicator,
    model: &Inference,
    domains: &[Domain<'_>],
    options: EvalOptions,
    ui: &Ui,
) -> Result<EvalReport> {
    let report = Progress::during(ui, "evaluating", Unit::Windows, |show| {
        evaluate_domains_on(comm, model, domains, options, &mut |done, total| show(done as u64, total as u64))
    })?;
    if !report.nll.is_finite() {
        bail!(
            "the mean likelihood is not finite: the model overflows on this text; take an earlier checkpoint of it"
        );
    }
    Ok(report)
}

/// Formats the perplexities by source as a table.
pub(crate) fn domain_table(domains: &[DomainReport]) -> String {
    let mut table = Table::new(["source", "share", "tokens", "perplexity", "nll", "active share"]);
    for domain in domains {
        table.row([
            domain.name.clone(),
            format::percent(domain.share),
            format::count(domain.tokens as u64),
            format!("{:.4}", domain.ppl),
            format!("{:.6}", domain.nll),
            format::or_dash(domain.active_ratio, format::percent),
        ]);
    }
    table.show()
}

/// Words the shares of weights that a token uses.
pub(crate) fn used_weights(used: &UsedShares) -> String {
    let UsedShares { attention, heads, ffn, neurons, all } = *used;
    let [attention, heads, ffn, neurons, all] = [attention, heads, ffn, neurons, all].map(format::percent);
    format!("{all} of the linears'; q, k, v {attention}, o {heads}, gate and up {ffn}, down {neurons}")
}
