//! The model card of an export: what the model is, what it was made from, and how to load it.

use std::path::Path;

use super::{DenseForm, ExportAs, Measured};
use crate::accounting::Accounting;
use crate::checkpoint::{
    CARD_FILE, GENERATED, Manifest, SOURCE_CARD_FILE, copy_file, has_licences, is_generated, read_card,
};
use crate::config::{Config, MoeConfig};
use crate::error::{Error, Result};
use crate::ffn::DsmoeForm;
use crate::files::{replace_synced, write_synced};
use crate::gguf;
use crate::masks::Masks;

/// Keys of the source's front matter that state its licence.
const LICENCE_KEYS: [&str; 3] = ["license", "license_name", "license_link"];
/// The longest value of such a key.
const LONGEST_VALUE: usize = 200;

/// The facts of a card.
pub(super) struct Card<'a> {
    pub(super) name: &'a str,
    /// The model as it was read.
    pub(super) config: &'a Config,
    pub(super) masks: Option<&'a Masks>,
    pub(super) form: ExportAs,
    pub(super) dense: Option<DenseForm>,
    pub(super) measured: &'a [Measured],
}

/// Writes the card to the directory `dir`, which replaces `target`. A card of `target` that somebody wrote is kept; it
/// returns whether the new one was written.
pub(super) fn write(card: &Card<'_>, dir: &Path, target: &Path) -> Result<bool> {
    let (path, old) = (dir.join(CARD_FILE), target.join(CARD_FILE));
    if old.is_file() && !is_generated(&old)? {
        copy_file(&old, &path)?;
        return Ok(false);
    }
    let source = dir.join(SOURCE_CARD_FILE);
    let source = if source.is_file() { Some(read_card(&source)?) } else { None };
    let text = card.text(source.as_deref(), has_licences(dir));
    write_synced(&path, text.as_bytes()).map_err(Error::io(&path))?;
    Ok(true)
}

impl Card<'_> {
    /// Returns the text. `source` is the card of the base model; `licences` says whether its licence files are there.
    fn text(&self, source: Option<&str>, licences: bool) -> String {
        let remote = self.form != ExportAs::Dense && self.config.needs_remote_code();
        let mut front = vec![
            "---".to_owned(),
            "library_name: transformers".to_owned(),
            "pipeline_tag: text-generation".to_owned(),
            "tags:".to_owned(),
            "- dsmoe".to_owned(),
        ];
        if remote {
            front.extend(["- mixture-of-experts".to_owned(), "- custom_code".to_owned()]);
        }
        front.extend(self.config.source_name().map(|name| format!("base_model: {name}")));
        front.extend(source.map(licence).unwrap_or_default());
        front.push("---".to_owned());
        let mut rows: Vec<(&str, String)> =
            self.base_model(source).map(|name| ("base model", name)).into_iter().collect();
        rows.push(("method", self.method()));
        rows.extend(self.sizes());
        rows.extend(self.measured.iter().map(row));
        let table: Vec<String> = rows.iter().map(|(key, value)| format!("| {key} | {value} |")).collect();
        let mut notes = String::new();
        if source.is_some() {
            notes += &format!("\nThe card of the base model is {SOURCE_CARD_FILE}.\n");
        }
        if licences {
            notes += "\nThe licence files beside the weights are those of the base model.\n";
        }
        format!(
            "{}\n{GENERATED}\n\n# {}\n\n{}\n\n| | |\n| --- | --- |\n{}\n\n## Use\n\n{}{notes}",
            front.join("\n"),
            plain(self.name),
            self.summary(),
            table.join("\n"),
            self.usage(remote),
        )
    }

    /// Returns the name of the base model on the Hub, or the one in the metadata of a GGUF file.
    fn base_model(&self, source: Option<&str>) -> Option<String> {
        self.config.source_name().or_else(|| source.and_then(gguf::name_in_card).map(plain))
    }

    fn summary(&self) -> String {
        let kind = match (self.dense, &self.config.moe, &self.config.ffn) {
            (Some(DenseForm::Source), ..) => {
                "The dense model that a sparse model was made from, exported from it"
            }
            (Some(DenseForm::AllOpen), ..) => {
                "A dense model that computes what its sparse model with open gates computes"
            }
            (Some(DenseForm::Folded), ..) => {
                "A dense approximation of a sparse model: the mean factors of its experts are part of the weights"
            }
            (None, Some(_), _) => {
                "A sparse model: every FFN is cut into experts, and gates decide for each token which of them run"
            }
            (None, None, Some(_)) if self.config.family().has_experts() => {
                "A mixture of experts, a fixed number of which run for each token"
            }
            (None, None, Some(_)) => {
                "A sparse model: every FFN is cut into experts, a fixed number of which run for each token"
            }
            _ if self.masks.is_some() => "A pruned model: single weights are 0",
            _ if !self.config.is_even() => "A pruned model: its layers have different sizes",
            _ if self.config.architecture.output_bias => "A pruned model: a bias stands for removed neurons",
            _ if self.config.needs_remote_code() => {
                "A pruned model: its hidden size is not that of its heads"
            }
            _ => "A dense model",
        };
        format!("{kind}. Made by [dsmoe](https://github.com/dsmoe/dsmoe).")
    }

    fn method(&self) -> String {
        match (&self.config.moe, &self.config.ffn) {
            (Some(moe), _) => method(moe),
            (None, Some(spec)) => {
                let settings: Vec<String> = spec
                    .settings()
                    .iter()
                    .map(|(key, value)| format!("{key} {}", plain(&value.to_string())))
                    .collect();
                format!("{}: {}", spec.kind(), settings.join(", "))
            }
            _ if self.masks.is_some() => "weights set to 0".to_owned(),
            _ if !self.config.is_even() => "heads and neurons removed".to_owned(),
            _ if self.config.architecture.output_bias => {
                "neurons removed; a bias stands for the mean of what they added".to_owned()
            }
            _ if self.config.needs_remote_code() => "channels of the residual stream removed".to_owned(),
            _ => "dense".to_owned(),
        }
    }

    fn sizes(&self) -> Vec<(&'static str, String)> {
        let mut dense = self.config.clone();
        if self.form == ExportAs::Dense {
            dense.moe = None;
        }
        let counts = Accounting::of(&dense);
        let counts = match self.masks {
            Some(masks) => counts.with_masks(masks),
            None => counts,
        };
        let mut rows = vec![("parameters", counts.total.to_string())];
        let target = dense.moe.as_ref().map(|moe| moe.active_target);
        match (target, dense.fixed_active()) {
            (Some(Some(share)), _) => {
                let active = counts.activated(share * counts.num_experts);
                rows.push(("active experts", format!("{:.1} % on average, as trained for", 100.0 * share)));
                rows.push(("parameters per token", format!("{active:.0} on average")));
            }
            (_, Some(active)) => {
                rows.push(("active experts", format!("{active} of {}", counts.num_experts)));
                rows.push(("parameters per token", format!("{:.0}", counts.activated(active))));
            }
            _ if self.masks.is_some() => {
                rows.push(("weights that are not 0", format!("{:.0}", counts.activated(0.0))));
            }
            _ => {}
        }
        rows
    }

    fn usage(&self, remote: bool) -> String {
        if self.form == ExportAs::Native && remote {
            return "dsmoe reads the directory. For transformers, export it in the form hf.\n".to_owned();
        }
        let trust = if remote { ", trust_remote_code=True" } else { "" };
        let hint = match remote {
            true => {
                "The model class is the file `modeling_dsmoe.py` beside the weights; read it before you trust it.\n\n"
            }
            false => "",
        };
        format!(
            "{hint}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"DIRECTORY\"{trust})\n\
             model = AutoModelForCausalLM.from_pretrained(\"DIRECTORY\"{trust}, dtype=\"auto\")  # before 4.56: torch_dtype\n\
             inputs = tokenizer(\"Once upon a time\", return_tensors=\"pt\")\n\
             print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n"
        )
    }
}

fn method(moe: &MoeConfig) -> String {
    let router = &moe.router;
    let mut parts = vec![
        match moe.parts.experts.iter().min() {
            None => format!("DSMoE, {} experts per layer", router.num_experts),
            Some(fewest) => format!("DSMoE, {fewest} to {} experts per layer", router.num_experts),
        },
        match moe.threshold() {
            Some(threshold) => format!("gates above {threshold}"),
            None => "gates above the threshold of their layer".to_owned(),
        },
        format!("gate value {}", router.gate_value),
        format!("rescale {}", router.rescale),
        format!("tokens without an active expert: {}", router.zero_active),
    ];
    let with_core = moe.parts.core.iter().position(|&core| core > 0);
    let beside = DsmoeForm::of_layer(moe, with_core.unwrap_or(0)).parts();
    parts.extend(beside.into_iter().map(str::to_owned));
    if let (Some(first), Some(last)) = (moe.parts.budgets.first(), moe.parts.budgets.last()) {
        parts.push(format!("thresholds for {} to {} of the experts", first.active, last.active));
    }
    if moe.untrained {
        parts.push("not trained since the conversion".to_owned());
    }
    parts.join(", ")
}

/// Adds a perplexity to the card in `dir` if this program wrote it, behind those that are there.
///
/// # Errors
/// The file system refuses.
pub fn add_perplexity(dir: &Path, measured: &Measured) -> Result<()> {
    let path = dir.join(CARD_FILE);
    if !path.is_file() || !is_generated(&path)? {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let is_row = |line: &String| line.starts_with("| perplexity |") || line.starts_with("| parameters |");
    if let Some(last) = lines.iter().rposition(is_row) {
        let (key, value) = row(measured);
        lines.insert(last + 1, format!("| {key} | {value} |"));
        Manifest::forget(dir, CARD_FILE)?;
        replace_synced(&path, (lines.join("\n") + "\n").as_bytes()).map_err(Error::io(&path))?;
        Manifest::renew(dir, CARD_FILE)?;
    }
    Ok(())
}

fn row(Measured { text, perplexity }: &Measured) -> (&'static str, String) {
    ("perplexity", format!("{perplexity:.4} ({})", plain(text)))
}

/// Returns the lines of a card's front matter that state its licence.
fn licence(card: &str) -> Vec<String> {
    // Some editors write a byte-order mark.
    let mut lines = card.trim_start_matches('\u{FEFF}').lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return Vec::new();
    }
    let licence = |line: &str| {
        let (key, value) = line.split_once(':')?;
        let (key, value) = (key.trim_end(), value.trim());
        let is_plain =
            !value.is_empty() && value.len() <= LONGEST_VALUE && !value.chars().any(char::is_control);
        (LICENCE_KEYS.contains(&key) && is_plain).then(|| format!("{key}: {value}"))
    };
    lines.take_while(|line| *line != "---").filter_map(licence).collect()
}

/// Returns text without what would break a table or a line.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || c == '|' { ' ' } else { c }).take(LONGEST_VALUE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_of_the_source_is_taken_from_its_front_matter_alone() {
        let card =
            "---\nlicense: llama2\nlicense_link: https://x.org/y\ntags:\n- license: z\n---\nlicense: mit\n";
        assert_eq!(licence(card), ["license: llama2", "license_link: https://x.org/y"]);
        assert_eq!(licence("# Card\n---\nlicense: mit\n---\n"), Vec::<String>::new());
        assert_eq!(licence("---\nlicense:\n- mit\n---\n"), Vec::<String>::new());
        assert_eq!(
            licence("\u{FEFF}---\r\nlicense:\tmit \r\nlicense_name : x\r\n---\r\n"),
            ["license: mit", "license_name: x"]
        );
        assert_eq!(licence("---\nlicense: a\u{1b}[m\n---\n"), Vec::<String>::new());
        let long = format!("---\nlicense: {}\n---\n", "x".repeat(300));
        assert_eq!(licence(&long), Vec::<String>::new());
    }

    #[test]
    fn a_perplexity_is_added_behind_the_others_of_an_own_card() {
        let dir = tempfile::tempdir().unwrap();
        let measured = Measured { text: "folded | x".into(), perplexity: 2.5 };
        add_perplexity(dir.path(), &measured).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no card");
        let card = dir.path().join(CARD_FILE);
        for (text, wanted) in [
            (
                format!("{GENERATED}\n| parameters | 9 |\n| perplexity | 1 |\n\nUse\n"),
                "| perplexity | 1 |\n| perplexity | 2.5000 (folded   x) |\n\nUse\n",
            ),
            (
                format!("{GENERATED}\n| parameters | 9 |\n"),
                "| parameters | 9 |\n| perplexity | 2.5000 (folded   x) |\n",
            ),
            ("| parameters | 9 |\n".to_owned(), "| parameters | 9 |\n"),
        ] {
            std::fs::write(&card, &text).unwrap();
            add_perplexity(dir.path(), &measured).unwrap();
            let found = std::fs::read_to_string(&card).unwrap();
            assert!(found.ends_with(wanted), "{found}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_card_that_gets_a_perplexity_is_that_of_the_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let card = dir.path().join(CARD_FILE);
        std::fs::write(&card, format!("{GENERATED}\n| parameters | 9 |\n")).unwrap();
        Manifest::write(dir.path(), &crate::checkpoint::Sums::default()).unwrap();
        // The rest of a card that a killed process was writing.
        let part = dir.path().join(format!(".{CARD_FILE}.tmp-{}", u32::MAX));
        std::fs::write(&part, "#").unwrap();
        add_perplexity(dir.path(), &Measured { text: "folded".into(), perplexity: 2.5 }).unwrap();
        let manifest = Manifest::read(dir.path()).unwrap().unwrap();
        assert!(manifest.holds(CARD_FILE, &std::fs::read(&card).unwrap()));
        assert!(!part.exists() || !Path::new("/proc/self").exists());
    }
}
