//! Gradients and parameters that lie in parts at their owners (ZeRO stages 2 and 3): units are whole only while a pass works
//! on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use dsmoe_core::Model;
use dsmoe_core::model::{Grads, Params, Units, Weights};
use dsmoe_core::shard::{Shards, Staging};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What};

/// The memory of units and of the own parts.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// This process's part of the gradients of the current lanes.
    pub(super) own: Buf,
    /// Whole gradients of the units at work, of this process's lane.
    grads: BTreeMap<usize, Buf>,
    /// The parameters of one unit, where they lie in parts.
    whole: WholeUnit,
    /// Memory for gradients of units.
    free: Vec<Buf>,
    staging: Staging,
}

impl Parts {
    /// Starts a step: what is left of a step that was given up is no longer wanted, and parameters may have changed.
    pub(super) fn begin(&mut self, own: usize) {
        self.own.resize(own);
        self.free.extend(std::mem::take(&mut self.grads).into_values());
        self.whole.unit = None;
    }
}

/// The parameters of one unit.
#[derive(Debug, Default)]
struct WholeUnit {
    unit: Option<usize>,
    values: Buf,
}

impl WholeUnit {
    /// Makes unit `unit` whole, of which this process owns a part of `own`.
    fn load(
        &mut self,
        unit: usize,
        own: &[f32],
        (shards, staging): (&Shards, &mut Staging),
        (comm, of): (&dyn Communicator, What),
    ) -> dsmoe_core::Result<()> {
        if self.unit == Some(unit) {
            return Ok(());
        }
        let own = &own[shards.place(unit, comm.rank())];
        self.values.resize(shards.units()[unit].len());
        self.unit = None;
        shards.gather((comm, of), unit, &mut self.values, Some(own), staging)?;
        self.unit = Some(unit);
        Ok(())
    }
}

/// Parameters of a model that lie in parts at their owners, for an evaluation.
#[derive(Debug)]
pub(super) struct Gathered {
    own: Arc<Buf>,
    shards: Shards,
    comm: Arc<dyn Communicator>,
    whole: WholeUnit,
    staging: Staging,
}

impl Gathered {
    pub(super) fn new(own: Arc<Buf>, shards: Shards, comm: Arc<dyn Communicator>) -> Gathered {
        Gathered { own, shards, comm, whole: WholeUnit::default(), staging: Staging::default() }
    }
}

impl Weights for Gathered {
    fn params(&mut self, unit: usize) -> dsmoe_core::Result<Params<'_>> {
        let of = (&*self.comm, What::of("parameters"));
        self.whole.load(unit, &self.own, (&self.shards, &mut self.staging), of)?;
        Ok(Params::new(self.shards.units()[unit].start, &self.whole.values))
    }
}

/// The objects that a micro-batch borrows.
pub(super) struct Lent<'a> {
    pub(super) model: &'a Model,
    /// This process's part of the parameters, if the model holds none.
    pub(super) own_params: &'a [f32],
    pub(super) parts: &'a mut Parts,
    pub(super) shards: &'a Shards,
    pub(super) comm: &'a dyn Communicator,
    pub(super) step: u64,
    /// True for the last micro-batch of a lane, whose gradients are then complete.
    pub(super) last: bool,
}

impl Lent<'_> {
    /// Makes the parameters of unit `unit` whole.
    fn load(&mut self, unit: usize) -> dsmoe_core::Result<()> {
        let Lent { model, own_params, parts, shards, comm, step, .. } = self;
        if !model.is_outline() {
            return Ok(());
        }
        let of = (*comm, What::at(*step, "parameters"));
        parts.whole.load(unit, own_params, (shards, &mut parts.staging), of)
    }

    /// Makes room for the gradients of unit `unit`, zero at first.
    fn open(&mut self, unit: usize) {
        let Parts { grads, free, .. } = &mut *self.parts;
        grads.entry(unit).or_insert_with(|| {
            let mut room = free.pop().unwrap_or_default();
            room.resize(self.shards.units()[unit].len());
            room.clear();
            room
        });
    }
}

/// Returns the parameters of unit `unit`, which are whole.
fn lent<'a>(model: &'a Model, params: &'a [f32], first: usize) -> Params<'a> {
    if model.is_outline() { Params::new(first, params) } else { Params::new(0, model.params()) }
}

impl Weights for Lent<'_> {
    fn params(&mut self, unit: usize) -> dsmoe_core::Result<Params<'_>> {
        self.load(unit)?;
        Ok(lent(self.model, &self.parts.whole.values, self.shards.units()[unit].start))
    }
}

impl Units for Lent<'_> {
    fn grads(&mut self, unit: usize) -> Grads<'_> {
        self.open(unit);
        let of_unit = self.parts.grads.get_mut(&unit).expect("opened above");
        Grads::new(self.shards.units()[unit].start, of_unit)
    }

    fn both(&mut self, unit: usize) -> dsmoe_core::Result<(Params<'_>, Grads<'_>)> {
        self.load(unit)?;
        self.open(unit);
        let first = self.shards.units()[unit].start;
        let Parts { grads, whole, .. } = &mut *self.parts;
        let of_unit = grads.get_mut(&unit).expect("opened above");
        Ok((lent(self.model, &whole.values, first), Grads::new(first, of_unit)))
    }

    /// All go on or none: the backward pass sums over processes.
    fn go_on(&mut self, finite: bool) -> dsmoe_core::Result<bool> {
        let mut all = vec![0; self.comm.size()];
        let lens = vec![1; all.len()];
        self.comm.all_gather(What::at(self.step, "losses"), &[u8::from(finite)], &mut all, &lens)?;
        Ok(all.iter().all(|&finite| finite == 1))
    }

    fn done(&mut self, unit: usize) -> dsmoe_core::Result<()> {
        if !self.last {
            return Ok(());
        }
        let Lent { model, parts, shards, comm, step, .. } = self;
        let Some(mut grads) = parts.grads.remove(&unit) else { return Ok(()) };
        if let Some(masks) = model.masks() {
            masks.apply_within(&mut grads, model.layout(), shards.units()[unit].clone());
        }
        let of = What::at(*step, "gradients");
        let own = &mut parts.own[shards.place(unit, comm.rank())];
        shards.reduce((*comm, of), unit, &mut grads, Some(own), &mut parts.staging)?;
        parts.free.push(grads);
        Ok(())
    }
}
