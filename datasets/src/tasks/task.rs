//! A task: its files, and its definition in each release.

use std::path::PathBuf;

use super::column::Column;
use super::form::Form;
use super::profile::Profile;
use super::split::Split;
use super::stored::Sampler;
use crate::error::{Error, Result};

/// A benchmark: what its TOML file says.
#[derive(Debug)]
pub struct Task {
    /// The harness's name, or a user's own.
    pub name: &'static str,
    /// The question of the task, in one line.
    pub about: &'static str,
    /// Other names of the task.
    pub(crate) aliases: Vec<String>,
    /// Names of its folder in a folder of benchmarks.
    pub(crate) folders: Vec<String>,
    /// The configuration of its dataset, where there are several.
    pub(crate) subset: String,
    /// The split that is scored.
    pub split: Split,
    /// Version of the harness's definition.
    pub version: f64,
    /// Examples shown before each question, unless [`Options::shots`](super::Options::shots) says otherwise.
    pub shots: usize,
    /// True if one example more is drawn, and the document itself left out if it is among them.
    pub(crate) spare_shot: bool,
    /// The split of the examples, as file names say it.
    pub(crate) shot_split: &'static str,
    /// How examples are chosen.
    pub(crate) sampler: Sampler,
    /// The column in which examples are like the document.
    pub(crate) alike: Option<Column>,
    /// The column whose values name the tasks that this one consists of.
    pub(crate) group: Option<Column>,
    /// True if the lines of a text file are its rows.
    pub(crate) reads_lines: bool,
    /// True if samples show the question and the choices of a row.
    pub(crate) logs_choices: bool,
    /// Files that it names itself: to score, and to draw examples from.
    pub(crate) files: [Vec<PathBuf>; 2],
    /// The remedy in errors for a file of another dataset.
    pub(crate) wrong_file: &'static str,
    /// The definition in each release, or why it does not have the task or cannot run it.
    pub(crate) forms: Vec<(Profile, std::result::Result<Form, String>)>,
}

impl Task {
    /// Returns true if the release that `profile` follows can run this task.
    pub fn is_in(&self, profile: Profile) -> bool {
        self.form(profile).is_ok()
    }

    /// Returns true if the task names its own files.
    pub fn has_files(&self) -> bool {
        !self.files[0].is_empty()
    }

    /// Returns how `profile` prompts and scores this task.
    ///
    /// # Errors
    /// That release does not have the task, or cannot run it.
    pub(crate) fn form(&self, profile: Profile) -> Result<&Form> {
        let form = self.forms.iter().find(|(release, _)| *release == profile);
        let form = form.map_or(Err("is not known"), |(_, form)| form.as_ref().map_err(String::as_str));
        form.map_err(|reason| {
            let help = "leave it out, or use {profile} dsmoe";
            Error::task(self.name, format!("{profile} {reason}"), help)
        })
    }
}
