//! The memory of the state of a training in one of the processes that share it.

use dsmoe_core::Model;
use dsmoe_core::config::Config;
use dsmoe_core::model::MemoryUse;
use dsmoe_core::shard::{Shards, Staging};

use crate::config::TrainConfig;
use crate::error::Result;
use crate::ranks::{Zero, check_lanes};

/// How processes share a step.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_train::engine::Share;
/// use dsmoe_train::{TrainConfig, Zero};
///
/// let config = TrainConfig { steps: Some(1), lanes: Some(4), ..TrainConfig::default() }.resolve()?;
/// let share = Share::of(&config, 2, Zero::Gradients)?;
/// assert_eq!(share.lanes, 2);
/// assert!(!share.memory(&preset("tiny")?).is_empty());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Processes.
    pub processes: usize,
    /// Lanes of a step that each computes.
    pub lanes: usize,
    /// Micro-batches of a lane.
    pub accumulate: usize,
    /// The state that is divided among processes.
    pub zero: Zero,
}

impl Share {
    /// Returns how `processes` share the steps of `config`, resolved.
    ///
    /// # Errors
    /// They cannot share its lanes.
    pub fn of(config: &TrainConfig, processes: usize, zero: Zero) -> Result<Share> {
        check_lanes(config.lanes(), processes, zero)?;
        let (lanes, accumulate) = (config.lanes() / processes, config.accumulate);
        Ok(Share { processes, lanes, accumulate, zero })
    }

    /// Returns the memory of parameters, gradients and moments of a model of `config` on hosts, in the process that owns most.
    pub fn memory(&self, config: &Config) -> Vec<MemoryUse> {
        let Share { processes, lanes, accumulate, zero } = *self;
        let model = Model::outline(config.clone());
        let shards = Shards::new(model.layout(), processes);
        let f32s = |values: usize| size_of::<f32>() * values;
        let owned = |rank| shards.owned(rank).iter().map(|range| range.len()).sum();
        let own: usize = (0..processes).map(owned).max().unwrap_or(0);
        let all = model.layout().len();
        let units = shards.units().iter().map(|unit| unit.len());
        let (first, largest) = (shards.units()[0].len(), units.clone().max().unwrap_or(0));
        // A head that is the embedding is at work from the first to the last unit of a backward pass.
        let at_work = match (accumulate, config.tie_word_embeddings) {
            (2.., _) => all,
            (_, true) => first + units.skip(1).max().unwrap_or(0),
            (_, false) => largest,
        };
        let zero = zero.on(processes);
        let lanes = gradient_arenas(lanes);
        let mut uses = vec![match zero {
            Zero::Parameters => MemoryUse { what: "  weights", bytes: f32s(own + largest) },
            _ => MemoryUse { what: "  weights", bytes: f32s(all) },
        }];
        let gradients = if zero == Zero::Moments { lanes * all } else { lanes * own + at_work };
        uses.push(MemoryUse { what: "  gradients", bytes: f32s(gradients) });
        uses.push(MemoryUse { what: "  moments", bytes: f32s(2 * own) });
        if processes > 1 {
            let bytes = Staging::bytes(all as u64) as usize;
            uses.push(MemoryUse { what: "  exchange", bytes });
        }
        uses
    }
}

/// Returns the number of arenas of gradients of a process that computes so many lanes: the nodes of the tree that wait for a
/// neighbour, and the lane at work.
fn gradient_arenas(lanes: usize) -> usize {
    if lanes <= 1 { 1 } else { (lanes + 1).ilog2() as usize + 1 }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::comm::Tree;

    use super::gradient_arenas;

    #[test]
    fn arenas_of_gradients_are_those_that_the_tree_takes() {
        for lanes in [2, 3, 4, 6, 7, 8, 12, 63, 64] {
            let (mut tree, mut leaf) = (Tree::new(), Buf::zeros(16));
            let most = (0..lanes).map(|_| {
                tree.push(&mut leaf);
                // The lane at work is one more.
                tree.arrays() + 1
            });
            assert_eq!(gradient_arenas(lanes), most.max().unwrap(), "{lanes}");
        }
        assert_eq!(gradient_arenas(1), 1);
    }
}
