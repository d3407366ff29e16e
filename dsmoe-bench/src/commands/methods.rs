//! `dsmoe methods`: the methods of `dsmoe prune` with their settings.

use anyhow::Result;
use dsmoe_baselines::SettingInfo;
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
    settings: Vec<SettingInfo>,
}

pub(crate) fn run(ui: &mut Ui) -> Result<()> {
    let methods = dsmoe_baselines::methods().iter().map(|method| MethodReport {
        name: method.name(),
        summary: method.summary(),
        settings: method.settings(),
    });
    ui.result(&Report { methods: methods.collect() }, show)
}

fn show(report: &Report) -> String {
    let mut text = String::new();
    for method in &report.methods {
        text += &format!("{}\n  {}\n", method.name, method.summary);
        for SettingInfo { name, default, help } in &method.settings {
            let default = if default.is_empty() { String::new() } else { format!(" [{default}]") };
            text += &format!("    {name}{default}: {help}\n");
        }
    }
    text
}
