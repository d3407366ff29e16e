//! `dsmoe methods`: what `dsmoe prune` can do.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report {
    methods: Vec<MethodReport>,
}

#[derive(Debug, Serialize)]
struct MethodReport {
    name: &'static str,
    summary: &'static str,
    knobs: Vec<BTreeMap<&'static str, &'static str>>,
}

pub(crate) fn run(ui: &mut Ui) -> Result<()> {
    let methods = dsmoe_baselines::methods().iter().map(|method| MethodReport {
        name: method.name(),
        summary: method.summary(),
        knobs: method
            .knobs()
            .iter()
            .map(|knob| [("name", knob.name), ("default", knob.default), ("help", knob.help)].into())
            .collect(),
    });
    ui.result(&Report { methods: methods.collect() }, show)
}

fn show(report: &Report) -> String {
    let mut text = String::new();
    for method in &report.methods {
        text += &format!("{}\n  {}\n", method.name, method.summary);
        for knob in &method.knobs {
            let default = match knob["default"] {
                "" => String::new(),
                default => format!(" [{default}]"),
            };
            text += &format!("    {}{default}: {}\n", knob["name"], knob["help"]);
        }
    }
    text
}
