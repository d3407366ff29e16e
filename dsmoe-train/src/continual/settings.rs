//! The settings of continual learning.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Keys of [`TrainConfig`](crate::TrainConfig) that hold for the steps of every task.
pub const TRAIN_KEYS: [&str; 21] = [
    "batch",
    "seq",
    "dtype",
    "accumulate",
    "lr",
    "min_lr_ratio",
    "warmup_steps",
    "schedule",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip",
    "sparsity",
    "active_target",
    "router_lr_scale",
    "seed",
    "valid_fraction",
    "valid_samples",
    "save_every",
    "bos",
];

/// The rule that chooses the pruned weights.
///
/// ```
/// use dsmoe_train::continual::{Method, Prune};
///
/// let method = Method { prune: Prune::DualAveraging, ..Method::default() }.resolve()?;
/// // Dual averaging has a threshold, and no density is asked for.
/// assert_eq!((method.c, method.mu, method.density), (Some(0.005), Some(0.51), None));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prune {
    /// Nothing is pruned.
    None,
    /// The smallest weights go.
    Magnitude,
    /// The weights go whose removal changes the sharpness-aware loss least, to second order.
    Scores,
    /// Regularised dual averaging takes the optimiser's place; what it leaves at 0 is pruned.
    DualAveraging,
}

/// When weights are pruned.
///
/// ```
/// use dsmoe_train::continual::{Method, Prune, When};
///
/// let method = |when| Method { prune: Prune::Magnitude, when: Some(when), ..Method::default() };
/// // Steps between prunings make sense during a task only.
/// assert_eq!(method(When::During).resolve()?.every, Some(10));
/// assert_eq!(method(When::End).resolve()?.every, None);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// In steps of the first half of a task, along a cubic schedule.
    During,
    /// At once, after the last step of a task.
    End,
}

/// The weights that are ranked together.
///
/// ```
/// use dsmoe_train::continual::{Method, Over, Prune};
///
/// let of_rows = Method { prune: Prune::Scores, over: Some(Over::Row), ..Method::default() };
/// assert_eq!(of_rows.resolve()?.over, Some(Over::Row));
/// // Nothing is ranked where nothing is pruned.
/// assert!(Method { over: Some(Over::Row), ..Method::default() }.resolve().is_err());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// All of a matrix.
    Matrix,
    /// Those of one output.
    Row,
}

dsmoe_core::with_defaults! {
    /// The method that learns the tasks. Settings that another one does not read are errors.
    ///
    /// ```
    /// use dsmoe_train::continual::{Method, Prune};
    ///
    /// // The keys of a file, or the fields.
    /// let method: Method = toml::from_str("prune = 'scores'\ndensity = '40%'\nreplay = 64")?;
    /// let same = Method { prune: Prune::Scores, density: Some(0.4), replay: 64, ..Method::default() };
    /// assert_eq!(method, same);
    /// assert_eq!(method.resolve()?.replay_share, Some(0.25));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct Method {
        /// The rule that chooses the pruned weights: `none` (default), `magnitude`, `scores` or `dual-averaging`.
        pub prune: Prune = Prune::None,
        /// Share of the weights of the layers' linears that is kept, with `magnitude` and `scores`; default 0.5.
        #[serde(deserialize_with = "crate::config::share::option")]
        pub density: Option<f64> = None,
        /// `during` the first half of a task (default), or at its `end`.
        pub when: Option<When> = None,
        /// Steps between two prunings during a task; default 10.
        pub every: Option<u64> = None,
        /// The weights that are ranked together, `matrix` (default) or `row`.
        pub over: Option<Over> = None,
        /// Pruned weights may grow again in the next task; default true.
        pub regrow: Option<bool> = None,
        /// Length of the step uphill in sharpness-aware steps; 0 takes plain steps; default 0.05.
        pub rho: f64 = 0.05,
        /// Factor c of the threshold of dual averaging; default 0.005.
        pub c: Option<f64> = None,
        /// Exponent mu of the threshold of dual averaging; default 0.51.
        pub mu: Option<f64> = None,
        /// Share of the candidate sequences that is trained on, those that a step uphill costs most; default 1, all.
        #[serde(deserialize_with = "crate::config::share::one")]
        pub select: f64 = 1.0,
        /// Share of the candidates that is trained on whatever they score; default 0.1.
        #[serde(deserialize_with = "crate::config::share::option")]
        pub random: Option<f64> = None,
        /// Steps for which candidates are scored at once; default 10.
        pub select_every: Option<u64> = None,
        /// Sequences of earlier tasks that are kept; default 0.
        pub replay: usize = 0,
        /// Share of every batch that is of earlier tasks; default 0.25.
        #[serde(deserialize_with = "crate::config::share::option")]
        pub replay_share: Option<f64> = None,
        /// Weight of a pull to the weights after the last task, by their Fisher information; default 0.
        pub ewc: f64 = 0.0,
    }
}

impl Method {
    /// Checks every setting and fills in the defaults of those that are read.
    ///
    /// # Errors
    /// A setting outside its range, or one that this method does not read.
    pub fn resolve(mut self) -> Result<Method> {
        for (field, value, range, allowed) in [
            ("density", self.density.unwrap_or(1.0), 1e-3..=1.0, "a share from 0.001 to 1"),
            ("rho", self.rho, 0.0..=1e3, "0 to 1000"),
            ("c", self.c.unwrap_or(0.0), 0.0..=1e6, "0 to 1000000"),
            ("mu", self.mu.unwrap_or(0.5), 0.0..=1.0, "0 to 1"),
            ("select", self.select, 0.01..=1.0, "a share from 0.01 to 1"),
            ("random", self.random.unwrap_or(0.0), 0.0..=1.0, "a share from 0 to 1"),
            ("replay_share", self.replay_share.unwrap_or(0.0), 0.0..=0.9, "a share from 0 to 0.9"),
            ("ewc", self.ewc, 0.0..=1e9, "0 or more"),
        ] {
            if !range.contains(&value) {
                return Err(Error::field(field, value, allowed));
            }
        }
        if self.replay > MOST_REPLAY {
            return Err(Error::field("replay", self.replay, format!("at most {MOST_REPLAY}")));
        }
        for (field, steps) in [("every", self.every), ("select_every", self.select_every)] {
            if steps == Some(0) {
                return Err(Error::field(field, 0, "at least 1"));
            }
        }
        if self.prune == Prune::Scores && self.rho == 0.0 {
            return Err(Error::field("prune", "scores with rho 0", "rho above 0, or prune magnitude"));
        }
        if self.select < 1.0 && self.rho == 0.0 {
            return Err(Error::field("select", "below 1 with rho 0", "rho above 0, or select 1"));
        }
        self.refuse_unread()?;
        self.fill_in();
        Ok(self)
    }

    /// Returns whether weights are ranked and the last ones go.
    pub(crate) fn ranks(&self) -> bool {
        matches!(self.prune, Prune::Magnitude | Prune::Scores)
    }

    fn refuse_unread(&self) -> Result<()> {
        let (ranks, averages) = (self.ranks(), self.prune == Prune::DualAveraging);
        let selects = self.select < 1.0;
        for (field, is_set, is_read, allowed) in [
            ("density", self.density.is_some(), ranks, "it with prune magnitude or scores only"),
            ("when", self.when.is_some(), ranks, "it with prune magnitude or scores only"),
            ("over", self.over.is_some(), ranks, "it with prune magnitude or scores only"),
            (
                "every",
                self.every.is_some(),
                ranks && self.when != Some(When::End),
                "it with prune magnitude or scores during a task only",
            ),
            ("regrow", self.regrow.is_some(), ranks || averages, "it with a prune other than none"),
            ("c", self.c.is_some(), averages, "it with prune dual-averaging only"),
            ("mu", self.mu.is_some(), averages, "it with prune dual-averaging only"),
            ("random", self.random.is_some(), selects, "it with select below 1 only"),
            ("select_every", self.select_every.is_some(), selects, "it with select below 1 only"),
            ("replay_share", self.replay_share.is_some(), self.replay > 0, "it with replay above 0 only"),
        ] {
            if is_set && !is_read {
                return Err(Error::field(field, "set", allowed));
            }
        }
        Ok(())
    }

    fn fill_in(&mut self) {
        if self.ranks() {
            self.density.get_or_insert(0.5);
            self.over.get_or_insert(Over::Matrix);
            if *self.when.get_or_insert(When::During) == When::During {
                self.every.get_or_insert(10);
            }
        }
        if self.prune != Prune::None {
            self.regrow.get_or_insert(true);
        }
        if self.prune == Prune::DualAveraging {
            self.c.get_or_insert(0.005);
            self.mu.get_or_insert(0.51);
        }
        if self.select < 1.0 {
            self.random.get_or_insert(0.1);
            self.select_every.get_or_insert(10);
        }
        if self.replay > 0 {
            self.replay_share.get_or_insert(0.25);
        }
    }
}

/// Most sequences that are kept for replay: each is three numbers in a report.
const MOST_REPLAY: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_and_impossible_settings_are_errors() {
        for (text, wanted) in [
            ("density = 0.5", "density is set; use it with prune magnitude or scores only"),
            ("prune = 'scores'\nrho = 0.0", "prune is scores with rho 0; use rho above 0"),
            ("prune = 'magnitude'\ndensity = 0.0", "density is 0; use a share from 0.001 to 1"),
            (
                "prune = 'magnitude'\nwhen = 'end'\nevery = 3",
                "every is set; use it with prune magnitude or scores during",
            ),
            ("prune = 'dual-averaging'\ndensity = 0.5", "density is set"),
            ("replay_share = 0.5", "replay_share is set; use it with replay above 0 only"),
            ("random = 0.5", "random is set; use it with select below 1 only"),
            ("select = 0.3\nrho = 0.0", "select is below 1 with rho 0"),
            ("prune = 'magnitude'\nevery = 0", "every is 0; use at least 1"),
        ] {
            let method: Method = toml::from_str(text).unwrap();
            let message = method.resolve().unwrap_err().to_string();
            assert!(message.starts_with(wanted), "{message}");
        }
        let scores: Method = toml::from_str("prune = 'scores'").unwrap();
        let scores = scores.resolve().unwrap();
        assert_eq!((scores.density, scores.every, scores.over), (Some(0.5), Some(10), Some(Over::Matrix)));
        assert!(toml::from_str::<Method>("prun = 'scores'").is_err());
    }
}
