//! The work directory of a reconstruction: the finished layers, from which an interrupted one resumes, and at the end the reports.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_core::Model;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, Manifest, Sums, TensorInfo, Writer, copy_companions};
use dsmoe_core::files::write_synced;
use dsmoe_datasets::files::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{LayerReport, ReconstructOptions, ReconstructPaths, Thresholds};
use crate::checkpoint::model_identity;
use crate::error::{Error, Result};
use crate::files;
use crate::teacher;

/// The work directory, in that of the output.
const WORK: &str = "reconstruct";
const STATE_FILE: &str = "state.json";
/// The file of the reports of all layers. It says that the model is written, so that the layers are not needed any more. It stays,
/// so that the same command finds its work done.
const REPORTS_FILE: &str = "reports.json";
const FINAL_TEMPORARY: &str = ".final.tmp";

/// The identity of a reconstruction that resumes.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    model_sha256: String,
    teacher_sha256: String,
    text_sha256: String,
    options: serde_json::Value,
}

/// The finished layers of a reconstruction on disk.
pub(super) struct Work {
    dir: PathBuf,
    _lock: Option<fs::File>,
}

impl Work {
    /// Checks that the output directory may be used: an empty one, or to resume one of the same reconstruction.
    pub(super) fn prepare(
        paths: &ReconstructPaths,
        model: &Model,
        sequences: &[Vec<u32>],
        options: &ReconstructOptions,
    ) -> Result<Work> {
        let names = files::names(&paths.out)?;
        let (is_ours, dir) = (names.iter().any(|name| name == WORK), paths.out.join(WORK));
        if !names.is_empty() && !paths.resume {
            return Err(Error::OutToResume(paths.out.clone()));
        }
        if !names.is_empty() && !is_ours {
            return Err(Error::NotARun(paths.out.clone()));
        }
        let lock = files::lock_dir(&paths.out)?;
        let mut text = Sha256::new();
        for id in sequences.iter().flatten() {
            text.update(id.to_le_bytes());
        }
        let identity = Identity {
            model_sha256: model_identity(model),
            teacher_sha256: teacher::identity_of(&paths.teacher)?,
            text_sha256: hex(&text.finalize()),
            options: serde_json::to_value(options).expect("numbers are JSON"),
        };
        let state = dir.join(STATE_FILE);
        if is_ours && state.is_file() {
            files::check_dir(&dir)?;
            let saved: Identity = files::read_json(&state)?;
            saved.check(&state, &identity)?;
        } else {
            fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
            let text = serde_json::to_string_pretty(&identity).expect("strings are JSON");
            files::replace(&state, text.as_bytes())?;
        }
        Ok(Work { dir, _lock: lock })
    }

    fn file(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:04}"))
    }

    /// Writes a finished layer.
    pub(super) fn write(&self, model: &Model, thresholds: &Thresholds, report: &LayerReport) -> Result<()> {
        let layer = report.layer;
        let entries = || model.layout().entries().iter().filter(|entry| is_ffn(&entry.spec.name, layer));
        let infos = entries().map(|entry| TensorInfo {
            name: entry.spec.name.clone(),
            dtype: Dtype::F32,
            shape: entry.spec.shape.clone(),
        });
        let temporary = self.dir.join(format!(".layer-{layer:04}.tmp"));
        files::make_dir(&temporary, &self.file(layer), |dir| {
            let mut writer = Writer::create_file(&dir.join("ffn.safetensors"), infos.collect())?;
            for entry in entries() {
                writer.write_f32(&entry.spec.name, &model.params()[entry.range.clone()])?;
            }
            let sums = writer.sums();
            writer.finish()?;
            let bars: Vec<f64> = thresholds.bars.iter().map(|bars| bars[layer]).collect();
            let json = serde_json::json!({"report": report, "thresholds": bars}).to_string();
            let file = dir.join("report.json");
            write_synced(&file, json.as_bytes()).map_err(Error::io(&file))?;
            Manifest::write(dir, &sums)?;
            Ok(())
        })
    }

    /// Reads a finished layer into `model` and `thresholds`; returns none if it is not done.
    pub(super) fn read(
        &self,
        model: &mut Model,
        thresholds: &mut Thresholds,
        layer: usize,
    ) -> Result<Option<LayerReport>> {
        let path = self.file(layer);
        if !path.is_dir() {
            return Ok(None);
        }
        #[derive(Deserialize)]
        struct Done {
            report: LayerReport,
            thresholds: Vec<f64>,
        }
        files::check_dir(&path)?;
        let file = path.join("report.json");
        let done: Done = files::read_json(&file)?;
        if done.thresholds.len() != thresholds.bars.len() || done.report.layer != layer {
            return Err(Error::checkpoint(&file, "it is not of this reconstruction"));
        }
        let tensors = Checkpoint::open_file(&path.join("ffn.safetensors"))?;
        for entry in model.layout().entries().to_vec() {
            if is_ffn(&entry.spec.name, layer) {
                tensors.read_f32(&entry.spec.name, &mut model.params_mut()[entry.range])?;
            }
        }
        thresholds.bars.iter_mut().zip(done.thresholds).for_each(|(bars, bar)| bars[layer] = bar);
        Ok(Some(done.report))
    }

    /// Puts the model into the output directory, `config.json` last, and removes the finished layers.
    pub(super) fn finish(
        self,
        model: &Model,
        paths: &ReconstructPaths,
        reports: &[LayerReport],
    ) -> Result<()> {
        let temporary = paths.out.join(FINAL_TEMPORARY);
        files::fill_dir(&temporary, |dir| {
            let sums = model.save(dir, Dtype::F32)?;
            copy_companions(&paths.model, dir)?;
            Manifest::write(dir, &sums)?;
            Ok(())
        })?;
        files::move_into(&temporary, &paths.out)?;
        // A process that is killed while it removes them leaves layers that cannot be read.
        files::write_json(&self.dir.join(REPORTS_FILE), &reports)?;
        self.clear()
    }

    /// Returns the reports of all layers, if the model is written.
    pub(super) fn reports(&self) -> Result<Option<Vec<LayerReport>>> {
        let path = self.dir.join(REPORTS_FILE);
        path.is_file().then(|| files::read_json(&path)).transpose()
    }

    /// Removes the finished layers of a model that is written.
    pub(super) fn clear(&self) -> Result<()> {
        for name in files::names(&self.dir)?.iter().filter(|name| name.contains("layer-")) {
            files::remove_dir(&self.dir.join(name))?;
        }
        Manifest::write(&self.dir, &Sums::default())?;
        Ok(())
    }
}

fn is_ffn(name: &str, layer: usize) -> bool {
    name.starts_with(&format!("model.layers.{layer}.mlp."))
}

impl Identity {
    fn check(&self, path: &Path, now: &Identity) -> Result<()> {
        let short = |sha: &str| sha.chars().take(12).collect::<String>();
        for (field, saved, now) in [
            ("the model", short(&self.model_sha256), short(&now.model_sha256)),
            ("the teacher", short(&self.teacher_sha256), short(&now.teacher_sha256)),
            ("the text", short(&self.text_sha256), short(&now.text_sha256)),
            ("the settings", self.options.to_string(), now.options.to_string()),
        ] {
            if saved != now {
                let help = "give what this reconstruction started with, or another {out}";
                let (path, field) = (path.to_path_buf(), field.to_owned());
                return Err(Error::ResumeMismatch { path, field, saved, now, help: help.into() });
            }
        }
        Ok(())
    }
}
