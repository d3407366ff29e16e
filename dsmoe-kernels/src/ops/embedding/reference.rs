//! The definition of the embedding, in f64.

/// Returns `out[t] = scale table[ids[t]]`.
pub fn forward(table: &[f64], ids: &[u32], hidden: usize, scale: f64) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * hidden..][..hidden]).map(|x| scale * x).collect()
}

/// Returns the gradient of the table `[vocab, hidden]`: `dtable[ids[t]] += scale dout[t]`, from zero.
pub fn backward(dout: &[f64], ids: &[u32], [vocab, hidden]: [usize; 2], scale: f64) -> Vec<f64> {
    let mut dtable = vec![0.0; vocab * hidden];
    for (dout, &id) in dout.chunks(hidden).zip(ids) {
        for (sum, dout) in dtable[id as usize * hidden..][..hidden].iter_mut().zip(dout) {
            *sum += scale * dout;
        }
    }
    dtable
}
