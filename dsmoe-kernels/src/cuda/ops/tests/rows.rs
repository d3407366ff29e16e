//! Ops on rows: norms, embedding, rotation, losses, sums, the optimiser.

use half::bf16;

use super::{check_close, gpu_or_skip, to_f32, to_f64, values};
use crate::cuda::ops::{cross_entropy, elementwise, embedding, linear, optim, rms_norm, rope};
use crate::cuda::{Gpu, GpuBuf};
use crate::rope::reference::Rotation;
use crate::{adamw, cross_entropy as losses, embedding as tables, rms_norm as norms, rope as angles};

fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

#[test]
fn cuda_rms_norm_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_rms_norm_is_the_reference") else { return };
    let shapes = [(0, 64), (1, 1), (3, 67), (129, 128), (700, 2048), (5, 8192), (30, 100)];
    let variants = [(0.0, 1.0), (0.0, 0.25), (1.0, 1.0), (1.0, 0.25)];
    for ((rows, hidden), (offset, scale)) in shapes.into_iter().zip(variants.into_iter().cycle()) {
        let (x, y, w) = (values(rows * hidden, 1), values(rows * hidden, 2), values(hidden, 3));
        let eps = 1e-5f32;
        let part = f64::from(scale);
        let sum: Vec<f64> = to_f64(&x).iter().zip(to_f64(&y)).map(|(a, b)| a + part * b).collect();
        let whole: Vec<f64> = to_f64(&w).iter().map(|w| w + f64::from(offset)).collect();
        let (want, want_rstd) = norms::reference::forward(&sum, &whole, f64::from(eps));
        let dy = values(rows * hidden, 4);
        let (want_dx, want_dw) = norms::reference::backward(&to_f64(&dy), &sum, &whole, &want_rstd);

        let [x_on, y_on, dy_on] = &[&x, &y, &dy].map(|v| gpu.upload(&to_f32(v)).unwrap());
        let weight = &gpu.upload(&to_f32(&w)).unwrap();
        let mut h = gpu.zeros::<bf16>(rows * hidden).unwrap();
        let (mut out, mut rstd) = (gpu.zeros::<f32>(rows * hidden).unwrap(), gpu.zeros::<f32>(rows).unwrap());
        rms_norm::ForwardSum {
            h: &mut h,
            rstd: &mut rstd,
            out: &mut out,
            x: x_on,
            y: y_on,
            weight,
            offset,
            scale,
            eps,
        }
        .run()
        .unwrap();
        let what = format!("{rows} x {hidden} + {offset}, {scale}");
        check_close(&format!("{what} sum"), &out.download().unwrap(), &sum, |_| 1e-7);
        check_close(&format!("{what} rstd"), &rstd.download().unwrap(), &want_rstd, |i| 2e-6 * want_rstd[i]);
        let close = |i: usize| want[i].abs() * (1.0 / 256.0) + 1e-6;
        check_close(&format!("{what} h"), &to_f32(&h.download().unwrap()), &want, close);
        let before = h.download().unwrap();
        let mut plain = gpu.zeros::<bf16>(rows * hidden).unwrap();
        rms_norm::Forward { h: &mut plain, rstd: &mut rstd, x: &out, weight, offset, eps }.run().unwrap();
        assert_eq!(plain.download().unwrap(), before, "{what}: forward of the sum");
        let mut single = gpu.zeros::<f32>(rows * hidden).unwrap();
        rms_norm::Forward { h: &mut single, rstd: &mut rstd, x: &out, weight, offset, eps }.run().unwrap();
        check_close(&format!("{what} in f32"), &single.download().unwrap(), &want, |i| {
            2e-6 * (1.0 + want[i].abs())
        });
        plain.fill_zero().unwrap();
        rms_norm::Restore { h: &mut plain, x: &out, weight, offset, rstd: &rstd }.run().unwrap();
        assert_eq!(plain.download().unwrap(), before, "{what}: restored");

        let run = |add: bool| {
            let dx = &mut gpu.upload(&vec![1.0f32; rows * hidden]).unwrap();
            let dweight = &mut gpu.upload(&vec![1.0f32; hidden]).unwrap();
            let partials = &mut gpu.zeros::<f32>(rms_norm::partials_len(rows, hidden)).unwrap();
            let (dy, x, rstd) = (dy_on, &out, &rstd);
            rms_norm::Backward { dx, dweight, dy, x, weight, offset, rstd, partials, add }.run().unwrap();
            (dx.download().unwrap(), dweight.download().unwrap())
        };
        for add in [false, true] {
            let (dx, dw) = run(add);
            let base = if add { 1.0 } else { 0.0 };
            let wanted: Vec<f64> = want_dx.iter().map(|x| x + base).collect();
            check_close(&format!("{what} dx"), &dx, &wanted, |i| 2e-5 * (1.0 + wanted[i].abs()));
            let wanted: Vec<f64> = want_dw.iter().map(|x| x + 1.0).collect();
            check_close(&format!("{what} dweight"), &dw, &wanted, |_| 1e-5 * (1.0 + rows as f64).sqrt());
            assert_eq!(run(add), (dx, dw), "{what}: other bits the second time");
        }
    }
}

#[test]
fn cuda_embedding_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_embedding_is_the_reference") else { return };
    let (vocab, hidden) = (11, 37);
    let of_ids = [vec![], vec![3], vec![1, 4, 1, 1, 10, 0, 4]];
    for (ids, scale) in of_ids.into_iter().flat_map(|ids| [(ids.clone(), 1.0), (ids, 3.5)]) {
        let table = values(vocab * hidden, 1);
        let dout = values(ids.len() * hidden, 2);
        let want = tables::reference::forward(&to_f64(&table), &ids, hidden, f64::from(scale));
        let sizes = [vocab, hidden];
        let want_back = tables::reference::backward(&to_f64(&dout), &ids, sizes, f64::from(scale));
        let ids_on = &gpu.upload(&ids).unwrap();
        let mut out = gpu.zero_rows::<f32>(ids.len(), hidden).unwrap();
        let full = gpu.upload(&to_f32(&table)).unwrap();
        embedding::Forward { out: &mut out, table: &full, ids: ids_on, scale }.run().unwrap();
        assert_eq!(out.download().unwrap(), single(&want));
        let half = gpu.upload(&table).unwrap();
        out.fill_zero().unwrap();
        embedding::Forward { out: &mut out, table: &half, ids: ids_on, scale }.run().unwrap();
        assert_eq!(out.download().unwrap(), single(&want));
        let mut order = embedding::Occurrences::with_room(&gpu, 10).unwrap();
        order.update(&ids).unwrap();
        let mut dtable = gpu.zeros::<f32>(vocab * hidden).unwrap();
        let dout = &gpu.upload_rows(&to_f32(&dout), hidden).unwrap();
        embedding::Backward { dtable: &mut dtable, dout, order: &order, scale }.run().unwrap();
        check_close("dtable", &dtable.download().unwrap(), &want_back, |_| 1e-6);
    }
}

#[test]
fn cuda_rope_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_rope_is_the_reference") else { return };
    for (rotated, factor) in [(12, 1.0), (8, 1.25)] {
        check_rope(&gpu, rotated, factor);
    }
}

/// Compares the rotation of the first `rotated` values of heads with the reference.
fn check_rope(gpu: &Gpu, rotated: usize, factor: f64) {
    let (head_dim, heads, width, seq) = (12, 3, 50, 9);
    let frequencies = angles::reference::frequencies(rotated, 10000.0);
    let table = angles::Table::new(frequencies.clone(), factor, 64);
    let rows: Vec<f32> = (0..64)
        .flat_map(|p| {
            let (cos, sin) = table.angles(p);
            [cos, sin].concat()
        })
        .collect();
    let angles_on = &gpu.upload_rows(&rows, rotated).unwrap();
    let tokens = 2 * seq;
    let x = values(tokens * width, 1);
    let turned = heads * head_dim;
    let positions: Vec<usize> = (0..tokens).map(|t| 5 + t % seq).collect();
    let cut: Vec<f64> = to_f64(&x).chunks(width).flat_map(|row| row[..turned].to_vec()).collect();
    let turn = |x: &mut GpuBuf<bf16>, positions, back| {
        rope::Rotate { x, angles: angles_on, heads, head_dim, positions, back }.run().unwrap();
    };
    let sequences = rope::Positions::Sequences { len: seq, start: 5 };
    let rotation = Rotation { frequencies: &frequencies, factor, positions: &positions, heads, head_dim };
    for back in [false, true] {
        let want = match back {
            false => rotation.forward(&cut),
            true => rotation.backward(&cut),
        };
        let mut on = gpu.upload_rows(&x, width).unwrap();
        turn(&mut on, sequences, back);
        let got = to_f32(&on.download().unwrap());
        let got_cut: Vec<f32> = got.chunks(width).flat_map(|row| row[..turned].to_vec()).collect();
        check_close("rope", &got_cut, &want, |i| want[i].abs() / 256.0 + 1e-5);
        for (row, old) in got.chunks(width).zip(x.chunks(width)) {
            assert_eq!(row[turned..], to_f32(&old[turned..]), "columns behind the heads");
        }
    }
    let at: Vec<u32> = positions.iter().map(|&p| p as u32).collect();
    let at = gpu.upload(&at).unwrap();
    let [mut a, mut b] = [0; 2].map(|_| gpu.upload_rows(&x, width).unwrap());
    turn(&mut a, sequences, false);
    turn(&mut b, rope::Positions::At(&at), false);
    assert_eq!(a.download().unwrap(), b.download().unwrap());
}

#[test]
fn cuda_cross_entropy_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_cross_entropy_is_the_reference") else { return };
    let settings = [(1.0, None), (0.125, None), (1.0, Some(3.0)), (1.5, Some(20.0))];
    let settings = settings.map(|(scale, cap)| losses::Logits { scale, cap });
    let shapes = [(1, 2), (7, 33), (5, 5000), (3, 128_256)];
    for ((rows, vocab), settings) in shapes.into_iter().flat_map(|shape| settings.map(|s| (shape, s))) {
        let products: Vec<f32> = to_f32(&values(rows * vocab, 1)).iter().map(|x| 8.0 * x).collect();
        let mut targets: Vec<u32> = (0..rows as u32).map(|i| (i * 7919) % vocab as u32).collect();
        if rows > 2 {
            targets[1] = losses::IGNORE;
        }
        let scale = 0.125f32;
        let (by, cap) = (f64::from(settings.scale), settings.cap.map(f64::from));
        let logit = |x: &f32| -> (f64, f64) {
            let z = by * f64::from(*x);
            let Some(cap) = cap else { return (z, by) };
            let t = (z / cap).tanh();
            (cap * t, by * (1.0 - t * t))
        };
        let (mut want_z, mut want, mut want_dx) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &target) in products.chunks(vocab).zip(&targets) {
            let (z, slopes): (Vec<f64>, Vec<f64>) = row.iter().map(logit).unzip();
            let logs = losses::reference::log_softmax(&z);
            let seen = target != losses::IGNORE;
            want.push(if seen { -logs[target as usize] } else { 0.0 });
            want_dx.extend(logs.iter().zip(slopes).enumerate().map(|(i, (l, slope))| {
                let hit = if i == target as usize { 1.0 } else { 0.0 };
                if seen { f64::from(scale) * (l.exp() - hit) * slope } else { 0.0 }
            }));
            want_z.extend(z);
        }
        let what = format!("{rows} x {vocab} {settings:?}");
        let (mut logits, targets) =
            (gpu.upload_rows(&products, vocab).unwrap(), &gpu.upload(&targets).unwrap());
        cross_entropy::Finish { logits: &mut logits, settings }.run().unwrap();
        check_close(&format!("{what} logits"), &logits.download().unwrap(), &want_z, |i| {
            2e-6 * (1.0 + want_z[i].abs())
        });
        let logits = &logits;
        let mut got = gpu.zeros::<f32>(rows).unwrap();
        let dproducts = &mut gpu.zeros::<bf16>(rows * vocab).unwrap();
        cross_entropy::Chunk { losses: &mut got, dproducts, logits, targets, scale, settings }.run().unwrap();
        check_close(&format!("{what} loss"), &got.download().unwrap(), &want, |_| 2e-5);
        // Where a cap is all but reached, the slope is a small difference of numbers near 1.
        let near = if cap.is_some() { 2e-7 } else { 1e-9 };
        check_close(&format!("{what} dproducts"), &to_f32(&dproducts.download().unwrap()), &want_dx, |i| {
            want_dx[i].abs() / 200.0 + near
        });
        got.fill_zero().unwrap();
        cross_entropy::Forward { losses: &mut got, logits, targets }.run().unwrap();
        check_close(&format!("{what} loss alone"), &got.download().unwrap(), &want, |_| 2e-5);
    }

    // The first of equally likely tokens is greedy.
    let logits = &gpu.upload_rows(&[0.0f32, 3.0, 3.0, -1.0, 5.0, 1.0, 2.0, 0.0], 4).unwrap();
    let rows = &gpu.upload(&[0u32, 0, 1, 1]).unwrap();
    let targets = &gpu.upload(&[1u32, 2, 0, 3]).unwrap();
    let (mut found, mut greedy) = (gpu.zeros::<f32>(4).unwrap(), gpu.zeros::<u32>(4).unwrap());
    cross_entropy::Likelihoods { found: &mut found, greedy: &mut greedy, logits, rows, targets }
        .run()
        .unwrap();
    assert_eq!(greedy.download().unwrap(), [1, 0, 1, 0]);
    let first = losses::reference::log_softmax(&[0.0, 3.0, 3.0, -1.0]);
    let second = losses::reference::log_softmax(&[5.0, 1.0, 2.0, 0.0]);
    check_close("found", &found.download().unwrap(), &[first[1], first[2], second[0], second[3]], |_| 1e-5);
}

#[test]
fn cuda_optimiser_and_sums_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_optimiser_and_sums_are_the_reference") else { return };
    for len in [1usize, 1000, 300_001] {
        let [p, m, g] = [1, 2, 3].map(|seed| to_f32(&values(len, seed)));
        let v: Vec<f32> = to_f32(&values(len, 4)).iter().map(|x| x * x).collect();
        let hyper =
            adamw::Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 3 };
        let double = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let (mut want_p, mut want_m, mut want_v) = (double(&p), double(&m), double(&v));
        adamw::reference::step(&mut want_p, &mut want_m, &mut want_v, &double(&g), 0.5, &hyper);
        let [param, first, second] = &mut [&p, &m, &v].map(|values| gpu.upload(values).unwrap());
        let grad = &gpu.upload(&g).unwrap();
        let scale = &gpu.upload(&[0.5f32]).unwrap();
        let rounded = &mut gpu.zeros::<bf16>(len).unwrap();
        optim::AdamW { param, rounded, m: first, v: second, grad, scale, hyper: &hyper }.run().unwrap();
        let got = param.download().unwrap();
        check_close("p", &got, &want_p, |i| 1e-6 * (1.0 + want_p[i].abs()));
        check_close("m", &first.download().unwrap(), &want_m, |_| 1e-6);
        check_close("v", &second.download().unwrap(), &want_v, |_| 1e-6);
        let want: Vec<bf16> = got.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(rounded.download().unwrap(), want);
        rounded.fill_zero().unwrap();
        elementwise::Cast { out: rounded, x: param }.run().unwrap();
        assert_eq!(rounded.download().unwrap(), want);

        let mut sums = gpu.upload(&[1.0f64, 2.0]).unwrap();
        let mut partials = gpu.zeros::<f64>(optim::PARTIALS).unwrap();
        for (at, squares) in [(0, true), (1, false)] {
            let out = &mut sums.part_mut(at..at + 1);
            optim::AddSum { out, x: grad, squares, partials: &mut partials }.run().unwrap();
        }
        let got = sums.download().unwrap();
        let squares: f64 = double(&g).iter().map(|x| x * x).sum();
        let sum: f64 = double(&g).iter().sum();
        assert!((got[0] - 1.0 - squares).abs() < 1e-9 * len as f64, "{} {squares}", got[0]);
        assert!((got[1] - 2.0 - sum).abs() < 1e-9 * len as f64, "{} {sum}", got[1]);
    }
    let mut x = gpu.upload(&[1.0f32, 2.0, 3.0]).unwrap();
    let mask = gpu.upload(&[1u8, 0, 1]).unwrap();
    elementwise::Keep { x: &mut x, mask: &mask }.run().unwrap();
    assert_eq!(x.download().unwrap(), [1.0, 0.0, 3.0]);
    for len in [0, 1, 1000] {
        let [a, b] = [1, 2].map(|seed| to_f32(&values(len, seed)));
        let (mut sum, b_on) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap());
        elementwise::Add { y: &mut sum, x: &b_on }.run().unwrap();
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(sum.download().unwrap(), want);

        // Powers of two multiply without rounding.
        let (mut scaled, mut rounded) = (gpu.zeros::<f32>(len).unwrap(), gpu.zeros::<bf16>(len).unwrap());
        elementwise::Scale { out: &mut scaled, x: &b_on, scale: 0.25 }.run().unwrap();
        elementwise::Scale { out: &mut rounded, x: &b_on, scale: 0.25 }.run().unwrap();
        let want: Vec<f32> = b.iter().map(|b| 0.25 * b).collect();
        assert_eq!(scaled.download().unwrap(), want);
        assert_eq!(to_f32(&rounded.download().unwrap()), want);
        let (x, out) = (&gpu.upload(&a).unwrap(), &mut scaled);
        elementwise::Join { h: &mut rounded, out, x, y: &b_on, scale: 0.25 }.run().unwrap();
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + 0.25 * b).collect();
        assert_eq!(scaled.download().unwrap(), want);
        let want: Vec<bf16> = want.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(rounded.download().unwrap(), want);
    }
}

#[test]
fn cuda_norms_of_heads_are_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_norms_of_heads_are_the_reference") else { return };
    for (rows, heads, head_dim, first, width) in
        [(1, 1, 1, 0, 1), (7, 3, 16, 5, 60), (130, 4, 128, 512, 1030), (33, 1, 700, 10, 720)]
    {
        for offset in [0.0, 1.0] {
            let columns = first..first + heads * head_dim;
            let (x, dy, w) = (values(rows * width, 1), values(rows * width, 2), values(head_dim, 3));
            let cut = |x: &[f64]| -> Vec<f64> {
                x.chunks(width).flat_map(|row| row[columns.clone()].to_vec()).collect()
            };
            let (old, dy_cut, eps) = (cut(&to_f64(&x)), cut(&to_f64(&dy)), 1e-5f32);
            let whole: Vec<f64> = to_f64(&w).iter().map(|w| w + f64::from(offset)).collect();
            let (want, want_rstd) = norms::reference::forward(&old, &whole, f64::from(eps));
            let (want_dx, want_dw) = norms::reference::backward(&dy_cut, &old, &whole, &want_rstd);

            let norm = rms_norm::Heads { first, heads, offset };
            let weight = &gpu.upload(&to_f32(&w)).unwrap();
            let mut on = gpu.upload_rows(&x, width).unwrap();
            let mut saved = gpu.zeros::<bf16>(old.len()).unwrap();
            let mut rstd = gpu.zeros::<f32>(rows * heads).unwrap();
            let into = Some(&mut *saved);
            rms_norm::ForwardHeads { x: &mut on, saved: into, rstd: &mut rstd, weight, heads: norm, eps }
                .run()
                .unwrap();
            let what = format!("{rows} x {heads} x {head_dim} + {offset}");
            let got = to_f64(&on.download().unwrap());
            let close = |i: usize| want[i].abs() / 256.0 + 1e-6;
            check_close(&format!("{what} y"), &single(&cut(&got)), &want, close);
            check_close(&format!("{what} rstd"), &rstd.download().unwrap(), &want_rstd, |i| {
                2e-6 * want_rstd[i]
            });
            assert_eq!(to_f64(&saved.download().unwrap()), old, "{what}: saved");

            let mut dx = gpu.upload_rows(&dy, width).unwrap();
            let mut dw = gpu.upload(&vec![1.0f32; head_dim]).unwrap();
            let mut partials = gpu.zeros::<f32>(rms_norm::partials_len(rows * heads, head_dim)).unwrap();
            rms_norm::BackwardHeads {
                dx: &mut dx,
                dweight: &mut dw,
                x: &saved,
                rstd: &rstd,
                weight,
                heads: norm,
                partials: &mut partials,
            }
            .run()
            .unwrap();
            let got_dx = to_f64(&dx.download().unwrap());
            check_close(&format!("{what} dx"), &single(&cut(&got_dx)), &want_dx, |i| {
                want_dx[i].abs() / 128.0 + 1e-4
            });
            let want_dw: Vec<f64> = want_dw.iter().map(|x| x + 1.0).collect();
            check_close(&format!("{what} dw"), &dw.download().unwrap(), &want_dw, |i| {
                1e-4 * (1.0 + want_dw[i].abs())
            });
            for (after, before) in [(&got, &x), (&got_dx, &dy)] {
                for (after, before) in after.chunks(width).zip(to_f64(before).chunks(width)) {
                    let others = |row: &[f64]| [&row[..first], &row[columns.end..]].concat();
                    assert_eq!(others(after), others(before), "{what}: other columns");
                }
            }
        }
    }
}

#[test]
fn cuda_biases_are_added_and_summed() {
    let Some(gpu) = gpu_or_skip("cuda_biases_are_added_and_summed") else { return };
    for (rows, width) in [(1, 1), (3, 67), (300, 40), (1000, 129)] {
        let (y, b) = (values(rows * width, 1), values(width, 2));
        let bias = &gpu.upload(&to_f32(&b)).unwrap();
        let want: Vec<f64> = to_f64(&y).iter().zip(to_f64(&b).iter().cycle()).map(|(y, b)| y + b).collect();
        let mut narrow = gpu.upload_rows(&y, width).unwrap();
        linear::AddBias { y: &mut narrow, bias }.run().unwrap();
        let close = |i: usize| want[i].abs() / 256.0 + 1e-9;
        check_close("bf16", &to_f32(&narrow.download().unwrap()), &want, close);
        let mut wide = gpu.upload_rows(&to_f32(&y), width).unwrap();
        linear::AddBias { y: &mut wide, bias }.run().unwrap();
        check_close("f32", &wide.download().unwrap(), &want, |_| 1e-6);

        let mut db = gpu.upload(&vec![1.0f32; width]).unwrap();
        let mut partials = gpu.zeros::<f32>(linear::partials_len(rows, width)).unwrap();
        let dy = &gpu.upload_rows(&y, width).unwrap();
        linear::BackwardBias { db: &mut db, dy, partials: &mut partials }.run().unwrap();
        let want: Vec<f64> =
            (0..width).map(|c| 1.0 + to_f64(&y).iter().skip(c).step_by(width).sum::<f64>()).collect();
        check_close("db", &db.download().unwrap(), &want, |_| 1e-5 * rows as f64);
    }
}
