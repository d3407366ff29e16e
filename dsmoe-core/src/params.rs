//! One arena for all parameters, with named views.
//!
//! Parameters, their gradients and the optimiser's moments are three arenas with one [`Layout`].

use std::collections::HashMap;
use std::ops::Range;

/// Relation of a tensor in memory to the one in a checkpoint.
///
/// ```
/// use dsmoe_core::params::{Stored, TensorSpec};
///
/// let up = TensorSpec::matrix("up_proj.weight", 512, 128);
/// let down = TensorSpec::matrix("down_proj.weight", 512, 128).transposed();
/// assert_eq!((up.stored, down.stored), (Stored::AsIs, Stored::Transposed));
/// // Neurons are rows of both in memory; the checkpoint has those of down as columns.
/// assert_eq!((up.stored_shape(), down.stored_shape()), (vec![512, 128], vec![128, 512]));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Row-major values as in memory.
    AsIs,
    /// The checkpoint holds the transpose (the FFN's down projection: an expert is then a row range in memory).
    Transposed,
}

/// Description of a tensor that has no place yet.
///
/// ```
/// use dsmoe_core::params::TensorSpec;
///
/// // The tensors of a gate with a factor that is learnt.
/// let router = TensorSpec::router("router.weight", vec![8, 128]);
/// let scale = TensorSpec { decay: false, ..TensorSpec::matrix("scale", 1, 128) };
/// let noise = TensorSpec::router("noise.weight", vec![8, 128]).training_only();
/// assert_eq!([&router, &scale, &noise].map(TensorSpec::numel), [1024, 128, 1024]);
/// assert!(router.router && !router.decay && noise.training_only);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint; for an [`crate::ffn::Ffn`], relative to `model.layers.{i}.mlp.`.
    pub name: String,
    /// Shape in memory.
    pub shape: Vec<usize>,
    /// Relation to the checkpoint.
    pub stored: Stored,
    /// True if weight decay applies (not to norms and routers).
    pub decay: bool,
    /// True if it belongs to a router.
    pub router: bool,
    /// True if only training reads it, as the noise of a gate; counts of parameters leave it out.
    pub training_only: bool,
    /// True if it lies directly behind the tensor before it: matrices of one width are then one matrix.
    pub joined: bool,
}

impl TensorSpec {
    /// Describes a weight matrix, stored as it is, with decay.
    pub fn matrix(name: impl Into<String>, rows: usize, cols: usize) -> TensorSpec {
        TensorSpec { decay: true, router: false, ..TensorSpec::router(name, vec![rows, cols]) }
    }

    /// Describes a norm's weight: no decay.
    pub fn norm(name: impl Into<String>, len: usize) -> TensorSpec {
        TensorSpec { router: false, ..TensorSpec::router(name, vec![len]) }
    }

    /// Describes a bias: no decay.
    pub fn bias(name: impl Into<String>, len: usize) -> TensorSpec {
        TensorSpec::norm(name, len)
    }

    /// Describes a router's tensor: no decay.
    pub fn router(name: impl Into<String>, shape: Vec<usize>) -> TensorSpec {
        let (name, stored) = (name.into(), Stored::AsIs);
        TensorSpec { name, shape, stored, decay: false, router: true, training_only: false, joined: false }
    }

    /// Returns the description of the transposed tensor.
    pub fn transposed(self) -> TensorSpec {
        TensorSpec { stored: Stored::Transposed, ..self }
    }

    /// Returns the description with [`TensorSpec::training_only`] set.
    pub fn training_only(self) -> TensorSpec {
        TensorSpec { training_only: true, ..self }
    }

    /// Returns the number of values.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the shape in the checkpoint.
    pub fn stored_shape(&self) -> Vec<usize> {
        match self.stored {
            Stored::AsIs => self.shape.clone(),
            Stored::Transposed => self.shape.iter().rev().copied().collect(),
        }
    }
}

/// A tensor with its place in the arena.
///
/// ```
/// use dsmoe_core::Model;
/// use dsmoe_core::init::preset;
/// use dsmoe_core::params::Entry;
///
/// let mut model = Model::new(preset("tiny")?);
/// let entries: Vec<Entry> = model.layout().entries().to_vec();
/// // Norms start at 1.
/// for Entry { range, .. } in entries.iter().filter(|entry| entry.spec.name.contains("norm")) {
///     model.params_mut()[range.clone()].fill(1.0);
/// }
/// let of_last_layer = entries.iter().filter(|entry| entry.layer == Some(3));
/// assert!(of_last_layer.clone().all(|entry| entry.spec.name.starts_with("model.layers.3.")));
/// assert_eq!(of_last_layer.count(), 9);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Description, with the full name.
    pub spec: TensorSpec,
    /// Range in the arena.
    pub range: Range<usize>,
    /// The decoder layer it belongs to.
    pub layer: Option<usize>,
}

/// The table of all tensors of a model.
///
/// ```
/// use dsmoe_core::params::{Entry, Layout, Stored, TensorSpec};
///
/// let layout = Layout::of(vec![
///     TensorSpec::matrix("model.layers.0.mlp.up_proj.weight", 4, 8),
///     TensorSpec::matrix("model.layers.0.mlp.down_proj.weight", 4, 8).transposed(),
/// ]);
/// let Entry { spec, range, .. } = layout.get("model.layers.0.mlp.down_proj.weight").unwrap();
/// assert_eq!((spec.stored, spec.stored_shape()), (Stored::Transposed, vec![8, 4]));
/// assert_eq!(range.len(), 32);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    len: usize,
}

/// Values a tensor of `numel` values occupies: whole cache lines.
pub(crate) fn padded(numel: usize) -> usize {
    numel.next_multiple_of(16)
}

impl Layout {
    /// Appends a tensor; returns its range.
    ///
    /// # Panics
    /// The name is taken: two modules claim one tensor.
    pub(crate) fn push(&mut self, spec: TensorSpec, layer: Option<usize>) -> Range<usize> {
        let [range] = self.push_joined([spec], layer);
        range
    }

    /// Appends tensors with nothing between them: matrices of one width are then one matrix.
    ///
    /// # Panics
    /// Those of [`Layout::push`].
    pub(crate) fn push_joined<const N: usize>(
        &mut self,
        specs: [TensorSpec; N],
        layer: Option<usize>,
    ) -> [Range<usize>; N] {
        let ranges = specs.map(|spec| self.place(spec, layer));
        self.len = padded(self.len);
        ranges
    }

    fn place(&mut self, spec: TensorSpec, layer: Option<usize>) -> Range<usize> {
        if spec.joined {
            self.len = self.entries.last().map_or(0, |entry| entry.range.end);
        }
        let range = self.len..self.len + spec.numel();
        self.len = range.end;
        let taken = self.by_name.insert(spec.name.clone(), self.entries.len());
        assert!(taken.is_none(), "layout: two tensors named {}", spec.name);
        self.entries.push(Entry { spec, range: range.clone(), layer });
        range
    }

    /// Makes the layout of the tensors of an FFN alone, as its part of the arena is laid out.
    ///
    /// # Panics
    /// Two tensors have one name.
    pub fn of(tensors: Vec<TensorSpec>) -> Layout {
        let mut layout = Layout::default();
        for spec in tensors {
            layout.push(spec, None);
        }
        layout
    }

    /// Returns all tensors, in arena order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns the tensor of that checkpoint name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).map(|&i| &self.entries[i])
    }

    /// Returns the tensors that start in `range`, in arena order.
    pub(crate) fn within(&self, range: &Range<usize>) -> &[Entry] {
        let first_from = |at| self.entries.partition_point(|entry| entry.range.start < at);
        &self.entries[first_from(range.start)..first_from(range.end)]
    }

    /// Returns the length of the arena, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
