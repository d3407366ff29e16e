//! The definition of the embedding, in f64.

/// Returns `out[t] = table[ids[t]]`.
pub fn forward(table: &[f64], ids: &[u32], hidden: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * hidden..][..hidden]).copied().collect()
}

/// Returns the gradient of the table: `dtable[ids[t]] += dout[t]`, from zero.
pub fn backward(dout: &[f64], ids: &[u32], vocab: usize, hidden: usize) -> Vec<f64> {
    let mut dtable = vec![0.0; vocab * hidden];
    for (dout, &id) in dout.chunks(hidden).zip(ids) {
        for (sum, dout) in dtable[id as usize * hidden..][..hidden].iter_mut().zip(dout) {
            *sum += dout;
        }
    }
    dtable
}
