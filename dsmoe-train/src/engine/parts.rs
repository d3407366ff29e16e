//! Gradients and parameters that lie in parts at their owners (ZeRO stages 2 and 3): units are whole only while a pass works
//! on them.

use std::collections::BTreeMap;

use dsmoe_core::Model;
use dsmoe_core::model::{Grads, Params, Units};
use dsmoe_core::shard::{Shards, Staging};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What};

/// The memory of units and of the own parts.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// What this process owns of the gradients of the lanes at work.
    pub(super) own: Buf,
    /// Whole gradients of the units at work, of this process's lane.
    grads: BTreeMap<usize, Buf>,
    /// The unit whose parameters are whole, where they lie in parts.
    whole: Option<usize>,
    params: Buf,
    /// Memory for gradients of units.
    free: Vec<Buf>,
    staging: Staging,
}

impl Parts {
    /// Starts a step: what is left of a step that was given up is no longer wanted, and parameters may have changed.
    pub(super) fn begin(&mut self, own: usize) {
        self.own.resize(own);
        self.free.extend(std::mem::take(&mut self.grads).into_values());
        self.whole = None;
    }
}

/// What a micro-batch is lent.
pub(super) struct Lent<'a> {
    pub(super) model: &'a Model,
    /// What this process owns of the parameters, where the model is without them.
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
        if !model.is_outline() || parts.whole == Some(unit) {
            return Ok(());
        }
        let of = What::at(*step, "parameters");
        let own = &own_params[shards.place(unit, comm.rank())];
        parts.params.resize(shards.units()[unit].len());
        parts.whole = None;
        shards.gather((*comm, of), unit, &mut parts.params, Some(own), &mut parts.staging)?;
        parts.whole = Some(unit);
        Ok(())
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

impl Units for Lent<'_> {
    fn params(&mut self, unit: usize) -> dsmoe_core::Result<Params<'_>> {
        self.load(unit)?;
        Ok(lent(self.model, &self.parts.params, self.shards.units()[unit].start))
    }

    fn grads(&mut self, unit: usize) -> Grads<'_> {
        self.open(unit);
        let of_unit = self.parts.grads.get_mut(&unit).expect("opened above");
        Grads::new(self.shards.units()[unit].start, of_unit)
    }

    fn both(&mut self, unit: usize) -> dsmoe_core::Result<(Params<'_>, Grads<'_>)> {
        self.load(unit)?;
        self.open(unit);
        let first = self.shards.units()[unit].start;
        let Parts { grads, params, .. } = &mut *self.parts;
        let of_unit = grads.get_mut(&unit).expect("opened above");
        Ok((lent(self.model, params, first), Grads::new(first, of_unit)))
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
