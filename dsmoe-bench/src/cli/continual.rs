//! The arguments of `dsmoe continual`.

use std::path::PathBuf;

use clap::Args;

use super::resumable::Resumable;

const ABOUT: &str = "\
The file lists the tasks in their order, with the settings of the steps and of the method:
  [train]                      # settings of dsmoe train --set: batch, seq, lr, seed, valid_fraction, save_every, ..
  batch = 8
  seq = 128
  [method]                     # all optional
  prune = \"scores\"             # none, magnitude, scores, dual-averaging
  density = 0.5                # share of the weights of linears that stays
  when = \"during\"              # the first half of each task, or at its end
  rho = 0.05                   # step uphill of sharpness-aware steps; 0: plain steps
  select = 0.3                 # train on this share of the sequences, those that a step uphill costs most
  replay = 500                 # sequences of earlier tasks that are kept and mixed in
  ewc = 100.0                  # pull to the weights after the last task, by their Fisher information
  [[task]]
  name = \"stories\"
  data = \"stories.txt\"         # a file, a folder or a list of them, seen from the file's folder
  steps = 100                  # 0: measured, not learnt

After EsaCL (arXiv 2401.05667), of which the abstract alone was available; the steps are sharpness-aware minimisation and \
generalised regularised dual averaging. The matrix has the held-out loss of every task (columns) after every task (rows); forgetting is \
the mean rise of a task's loss from when it was learnt to the end. --out gets the model after every task, and results.json.

Examples:
  dsmoe continual tasks.toml --model MODEL --dry-run
  dsmoe continual tasks.toml --model MODEL --out RUN
  dsmoe continual tasks.toml --model MODEL --out RUN --resume";

#[derive(Debug, Args)]
#[command(after_help = ABOUT)]
pub(crate) struct Continual {
    /// TOML file of the tasks; see below
    pub(crate) tasks: PathBuf,
    /// Model that learns: a dense or DSMoE directory, or a GGUF file
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) work: Resumable,
}
