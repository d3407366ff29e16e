//! Rotations on a device.

use std::ops::Range;

use dsmoe_kernels::cuda::ops::rope::{Positions, Rotate};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Matrix};
use dsmoe_kernels::rope::Table;
use half::bf16;

use super::heads;
use crate::config::{Config, Rope};
use crate::error::Result;
use crate::model::ropes::Ropes;

/// The rotations of a model. Those that depend on the number of positions of a pass have no table on the device.
#[derive(Debug)]
pub(crate) struct Turns {
    ropes: Ropes,
    /// Angles of all positions, `[positions, width]`, of each rotation.
    tables: Vec<Option<GpuBuf<f32>>>,
    widths: Vec<usize>,
}

/// Angles of the rows of a pass, `[rows, width]`, of the rotations that have no table.
pub(crate) type PassAngles = Vec<Option<GpuBuf<f32>>>;

/// Rows of one text in a pass: their positions, and the number of positions of the text.
#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    pub(crate) rows: Range<usize>,
    pub(crate) positions: usize,
}

/// The positions of the rows of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Where tables have their angles.
    pub(crate) positions: Positions<'a>,
    /// Rows that a pass's own angles are for: they repeat after these.
    pub(crate) rows: usize,
}

impl Turns {
    pub(crate) fn new(gpu: &Gpu, config: &Config) -> Result<Turns> {
        let (ropes, positions) = (Ropes::new(config), config.max_position);
        let widths = config.architecture.ropes.iter().map(|rope| rope.width).collect();
        let table = |(i, rope): (usize, &Rope)| {
            if rope.scaling.varies() {
                return Ok(None);
            }
            Ok(Some(gpu.upload_rows(&angles(&ropes.nth(i, positions), 0..positions), rope.width)?))
        };
        let tables = config.architecture.ropes.iter().enumerate().map(table).collect::<Result<_>>()?;
        Ok(Turns { ropes, tables, widths })
    }

    /// Returns the angles of a pass over `stretches`.
    pub(crate) fn of_pass(&self, gpu: &Gpu, stretches: &[Stretch]) -> Result<PassAngles> {
        let own = |(i, table): (usize, &Option<GpuBuf<f32>>)| match table {
            Some(_) => Ok(None),
            None => Ok(Some(gpu.upload_rows(&self.own_angles(i, stretches), self.widths[i])?)),
        };
        self.tables.iter().enumerate().map(own).collect()
    }

    /// Sets the angles of a pass over as many rows.
    pub(crate) fn update(&self, pass: &mut PassAngles, stretch: &Stretch) -> Result<()> {
        for (i, angles) in pass.iter_mut().enumerate() {
            if let Some(angles) = angles {
                angles.upload_from(&self.own_angles(i, std::slice::from_ref(stretch)))?;
            }
        }
        Ok(())
    }

    fn own_angles(&self, rope: usize, stretches: &[Stretch]) -> Vec<f32> {
        let of = |stretch: &Stretch| angles(&self.ropes.nth(rope, stretch.positions), stretch.rows.clone());
        stretches.iter().flat_map(of).collect()
    }

    /// Rotates queries and keys of layer `i`, where it is rotated.
    pub(crate) fn rotate(
        &self,
        config: &Config,
        i: usize,
        qkv: &mut Matrix<bf16>,
        pass: &PassAngles,
        place: Place<'_>,
    ) -> Result<()> {
        let Some(rope) = config.architecture.layers[i].rope else { return Ok(()) };
        match (&self.tables[rope], &pass[rope]) {
            (Some(angles), _) => rotate(config, i, qkv, angles, place.positions, false),
            (None, Some(angles)) => {
                let positions = Positions::Sequences { len: place.rows, start: 0 };
                rotate(config, i, qkv, angles, positions, false)
            }
            (None, None) => unreachable!("angles of a pass for a rotation without a table"),
        }
    }
}

/// Rotates queries and keys of layer `i`, or gradients of them back.
pub(crate) fn rotate(
    config: &Config,
    i: usize,
    x: &mut Matrix<bf16>,
    angles: &Matrix<f32>,
    positions: Positions<'_>,
    back: bool,
) -> Result<()> {
    let heads = heads(config, i);
    let (turned, head_dim) = (heads.heads + heads.kv_heads, heads.head_dim);
    Ok(Rotate { x, angles, heads: turned, head_dim, positions, back }.run()?)
}

/// Returns the angles of sequences of `seq` tokens, `[seq, width]`, of each rotation.
pub(crate) fn of_sequences(gpu: &Gpu, config: &Config, seq: usize) -> Result<Vec<GpuBuf<f32>>> {
    let ropes = Ropes::new(config);
    let upload =
        |(i, rope): (usize, &Rope)| Ok(gpu.upload_rows(&angles(&ropes.nth(i, seq), 0..seq), rope.width)?);
    config.architecture.ropes.iter().enumerate().map(upload).collect()
}

/// Returns cosines and sines of positions, `[positions, width]`.
fn angles(table: &Table, positions: Range<usize>) -> Vec<f32> {
    let row = |p| {
        let (cos, sin) = table.angles(p);
        [cos, sin].concat()
    };
    positions.flat_map(row).collect()
}
