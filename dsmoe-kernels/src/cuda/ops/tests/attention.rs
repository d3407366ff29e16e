use half::bf16;

use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::attention::{Dims, Scores, reference};
use crate::cuda::ops::attention::{self, Heads, Segments};
use crate::cuda::ops::decode::{self, At};

/// Returns sizes, odd ones too.
fn shapes() -> [Dims; 10] {
    let with = |window, cap, dims: Dims| {
        let scores = Scores { scale: 0.7 * dims.scores.scale, window, cap };
        Dims { scores, ..dims }
    };
    [
        dims([1, 1, 1, 1, 1, 16]),
        dims([2, 65, 65, 4, 2, 64]),
        dims([1, 200, 200, 2, 1, 128]),
        dims([3, 17, 17, 3, 3, 12]),
        dims([2, 130, 130, 6, 2, 32]),
        dims([1, 64, 64, 2, 2, 80]),
        with(None, None, dims([2, 65, 65, 4, 2, 64])),
        with(Some(1), None, dims([1, 70, 70, 2, 1, 16])),
        with(Some(45), None, dims([2, 200, 200, 4, 2, 64])),
        with(Some(70), Some(2.0), dims([1, 210, 210, 2, 1, 12])),
    ]
}

fn dims([batch, queries, keys, heads, kv_heads, head_dim]: [usize; 6]) -> Dims {
    Dims { batch, queries, keys, heads, kv_heads, head_dim, scores: Scores::plain(head_dim) }
}

/// Returns the columns of queries, keys and values in the rows of qkv.
fn columns(qkv: &[f64], dims: Dims) -> [Vec<f64>; 3] {
    let (width, kv) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
    let take = |start: usize, len: usize| {
        qkv.chunks_exact(dims.joined_width()).flat_map(|row| row[start..start + len].to_vec()).collect()
    };
    [take(0, width), take(width, kv), take(width + kv, kv)]
}

fn heads_of(dims: Dims) -> Heads {
    let Dims { heads, kv_heads, head_dim, scores, .. } = dims;
    Heads { heads, kv_heads, head_dim, scores }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Checks by the norm of the difference: probabilities and score gradients are rounded to bf16 before they are multiplied.
fn check_norm(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let difference: Vec<f64> = got.iter().zip(want).map(|(&a, b)| f64::from(a) - b).collect();
    let (off, size) = (norm(&difference), norm(want));
    assert!(off <= tolerance * size + 1e-6, "{what}: off by {off}, of {size}: {}", off / size);
}

#[test]
fn cuda_attention_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_attention_is_the_reference") else { return };
    for dims in shapes() {
        let rows = dims.batch * dims.queries;
        let qkv = values(rows * dims.joined_width(), 5);
        let dout = values(rows * dims.heads * dims.head_dim, 6);
        let [q, k, v] = columns(&to_f64(&qkv), dims);
        let (want, want_lse) = reference::forward(&q, &k, &v, dims);
        let (dq, dk, dv) = reference::backward(&to_f64(&dout), &q, &k, &v, dims);

        let (heads, seq) = (heads_of(dims), dims.queries);
        let qkv_on = &gpu.upload_rows(&qkv, dims.joined_width()).unwrap();
        let dout_on = &gpu.upload(&dout).unwrap();
        let run = || {
            let mut out = gpu.zeros::<bf16>(dout.len()).unwrap();
            let mut lse = gpu.zeros::<f32>(rows * dims.heads).unwrap();
            attention::Forward { out: &mut out, lse: &mut lse, qkv: qkv_on, heads, seq }.run().unwrap();
            let dqkv = &mut gpu.zeros::<bf16>(qkv.len()).unwrap();
            let deltas = &mut gpu.zeros::<f32>(rows * dims.heads).unwrap();
            let (dout, qkv, out, lse) = (dout_on, qkv_on, &out, &lse);
            attention::Backward { dqkv, dout, out, qkv, lse, heads, seq, deltas }.run().unwrap();
            (out.download().unwrap(), lse.download().unwrap(), dqkv.download().unwrap())
        };
        let (out, lse, dqkv) = run();
        // Rounding of probabilities and of the result: each half a unit of 8 bits, of values up to 1.
        check_close(&format!("{dims:?} out"), &to_f32(&out), &want, |_| 2.0 / 256.0);
        check_close(&format!("{dims:?} lse"), &lse, &want_lse, |i| 1e-5 * (1.0 + want_lse[i].abs()));
        let got: Vec<f64> = to_f64(&dqkv);
        let single = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|x| x as f32).collect() };
        let [got_q, got_k, got_v] = columns(&got, dims).map(single);
        for (what, got, want) in [("dq", got_q, dq), ("dk", got_k, dk), ("dv", got_v, dv)] {
            check_norm(&format!("{dims:?} {what}"), &got, &want, 0.02);
        }
        let (again, lse_again, dqkv_again) = run();
        assert!(
            out == again && lse == lse_again && dqkv == dqkv_again,
            "{dims:?}: other bits the second time"
        );
    }
}

#[test]
fn cuda_attention_over_caches_and_segments_is_that_of_sequences() {
    let Some(gpu) = gpu_or_skip("cuda_attention_over_caches_and_segments_is_that_of_sequences") else {
        return;
    };
    for dims in shapes().map(|dims| Dims { batch: 1, ..dims }) {
        let total = dims.queries;
        let qkv = values(total * dims.joined_width(), 7);
        let [q, k, v] = columns(&to_f64(&qkv), dims);
        let (want, _) = reference::forward(&q, &k, &v, dims);
        let (heads, room) = (heads_of(dims), total + 70);
        let width = heads.width();
        let on = gpu.upload_rows(&qkv, dims.joined_width()).unwrap();
        let cache = || gpu.zero_rows::<bf16>(room, heads.kv_width()).unwrap();
        let (keys, values) = (&mut cache(), &mut cache());
        let length = &mut gpu.zeros::<u32>(1).unwrap();
        let partials = &mut gpu.zeros::<f32>(decode::partials_len(heads, room)).unwrap();
        let mut start = 0;
        // Pieces of several tokens, then single ones.
        let mut sizes = vec![total / 2, total / 4];
        sizes.retain(|&size| size > 1);
        sizes.extend(vec![1; total - sizes.iter().sum::<usize>()]);
        for size in sizes {
            let qkv = &on.part(start..start + size);
            let out = &mut gpu.zero_rows::<bf16>(size, width).unwrap();
            if size > 1 {
                let at = At::Position(start);
                decode::Append { keys, values, qkv, at, heads }.run().unwrap();
                decode::Prefill { out, qkv, keys, values, start, heads }.run().unwrap();
            } else {
                length.upload_from(&[start as u32]).unwrap();
                let at = At::Length(length);
                decode::Append { keys, values, qkv, at, heads }.run().unwrap();
                decode::Decode { out, qkv, keys, values, length, heads, partials }.run().unwrap();
            }
            let got = to_f32(&out.download().unwrap());
            let want = &want[start * width..(start + size) * width];
            check_close(&format!("{dims:?} {size} at {start}"), &got, want, |_| 2.0 / 256.0);
            start += size;
        }

        // The same rows as a segment and what continues it, behind another one.
        let first = total / 3;
        let mut rows = super::values(5 * dims.joined_width(), 8);
        rows.extend_from_slice(&qkv);
        let count = total + 5;
        let places = [[0, 5, 0, 0], [5, first, 0, 0], [5 + first, total - first, 5, first]];
        let segments = Segments::new(&gpu, &places).unwrap();
        let qkv = &gpu.upload_rows(&rows, dims.joined_width()).unwrap();
        let mut out = gpu.zero_rows::<bf16>(count, width).unwrap();
        attention::Ragged { out: &mut out, qkv, segments: &segments, heads }.run().unwrap();
        let got = to_f32(&out.download().unwrap());
        check_close(&format!("{dims:?} segments"), &got[5 * width..], &want, |_| 2.0 / 256.0);
    }
}
