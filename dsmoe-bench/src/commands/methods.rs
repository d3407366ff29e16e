//! `dsmoe methods`: the methods of `dsmoe prune` with their settings.

use anyhow::Result;
use dsmoe_baselines::SettingInfo;
use serde_json::json;

use crate::ui::Ui;

pub(crate) fn run(ui: &mut Ui) -> Result<()> {
    let (mut text, mut methods) = (String::new(), Vec::new());
    for method in dsmoe_baselines::methods() {
        let (name, summary, settings) = (method.name(), method.summary(), method.settings());
        text += &format!("{name}\n  {summary}\n");
        for SettingInfo { name, default, help } in &settings {
            let default = if default.is_empty() { String::new() } else { format!(" [{default}]") };
            text += &format!("    {name}{default}: {help}\n");
        }
        let (source, counts) = (method.source(), method.counts());
        methods.push(json!({
            "name": name, "summary": summary, "source": source, "counts": counts, "settings": settings,
        }));
    }
    ui.result(&json!({ "methods": methods }), |_| text)
}
