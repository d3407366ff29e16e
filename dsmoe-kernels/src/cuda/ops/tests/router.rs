use super::{check_close, gpu_or_skip, to_f32, values};
use crate::cuda::ops::router::{self, Gates, Lists, Normed, Over, Routed, Sparsity};

pub(super) fn gates(num_experts: usize) -> Gates {
    Gates { num_experts, binary: false, rescale: false, force_argmax: false, ste: true }
}

/// The threshold of the logits, and the logit at which a gate is one half.
const THRESHOLDS: [f32; 2] = [0.1, 0.0];

/// Logits, gates, mask and coefficients as the router crate defines them.
pub(super) struct Want {
    pub(super) gates: Vec<f64>,
    pub(super) mask: Vec<u8>,
    pub(super) coefficients: Vec<f64>,
    pub(super) active: Vec<u32>,
}

pub(super) fn want(z: &[f32], [bar, centre]: [f32; 2], set: Gates) -> Want {
    let n = set.num_experts;
    let gates: Vec<f64> = z.iter().map(|&z| 1.0 / (1.0 + f64::from(centre - z).exp())).collect();
    let mut mask: Vec<u8> = z.iter().map(|&z| u8::from(z > bar || bar == f32::NEG_INFINITY)).collect();
    let mut active = Vec::new();
    let mut coefficients = Vec::new();
    for (t, row) in mask.chunks_mut(n).enumerate() {
        if set.force_argmax && row.iter().all(|&on| on == 0) {
            let z = &z[t * n..][..n];
            let best = (0..n).fold(0, |best, i| if z[i] > z[best] { i } else { best });
            row[best] = 1;
        }
        let k = row.iter().filter(|&&on| on != 0).count();
        active.push(k as u32);
        let scale = if set.rescale { n as f64 / k.max(1) as f64 } else { 1.0 };
        for (i, &on) in row.iter().enumerate() {
            let value = if set.binary { 1.0 } else { gates[t * n + i] };
            coefficients.push(if on != 0 { scale * value } else { 0.0 });
        }
    }
    Want { gates, mask, coefficients, active }
}

#[test]
fn cuda_router_is_the_reference() {
    let Some(gpu) = gpu_or_skip("cuda_router_is_the_reference") else { return };
    for (tokens, hidden, n) in [(0, 16, 2), (1, 7, 1), (63, 64, 8), (129, 100, 5), (1003, 48, 64)] {
        let x = to_f32(&values(tokens * hidden, 1));
        let rstd: Vec<f32> = to_f32(&values(tokens, 2)).iter().map(|x| x.abs() + 0.5).collect();
        let (norm, w, bias) =
            (to_f32(&values(hidden, 3)), to_f32(&values(n * hidden, 4)), to_f32(&values(n, 5)));
        let offset = if n == 5 { 1.0 } else { 0.0 };
        let h = |t: usize, i: usize| {
            f64::from(x[t * hidden + i]) * f64::from(rstd[t]) * (f64::from(norm[i]) + f64::from(offset))
        };
        let want_z: Vec<f64> = (0..tokens * n)
            .map(|at| {
                let (t, e) = (at / n, at % n);
                (0..hidden).map(|i| h(t, i) * f64::from(w[e * hidden + i])).sum::<f64>() + f64::from(bias[e])
            })
            .collect();
        let [x_on, rstd_on, norm_on] = &[&x, &rstd, &norm].map(|v| gpu.upload(v).unwrap());
        let (router, bias_on) = (&gpu.upload(&w).unwrap(), gpu.upload(&bias).unwrap());
        let normed = Normed { x: x_on, rstd: rstd_on, weight: norm_on, offset };
        let mut z = gpu.zeros::<f32>(tokens * n).unwrap();
        router::Logits { z: &mut z, normed, router, bias: Some(&bias_on) }.run().unwrap();
        let got_z = z.download().unwrap();
        check_close("logits", &got_z, &want_z, |_| 1e-6 * hidden as f64);

        for bits in 0..16 {
            let set = Gates {
                binary: bits & 1 != 0,
                rescale: bits & 2 != 0,
                force_argmax: bits & 4 != 0,
                ste: bits & 8 != 0,
                ..gates(n)
            };
            // Thresholds of a budget move a binary gate's middle too, and none open everything.
            let at = [THRESHOLDS, [-0.3, -0.3], [f32::NEG_INFINITY, 0.0]][bits % 3];
            let want = want(&got_z, at, set);
            // Room for more pairs.
            let mut routed = Routed::with_room(&gpu, tokens, n + 1).unwrap();
            let thresholds = &gpu.upload(&at).unwrap();
            router::Route { routed: &mut routed, z: &z, thresholds, gates: &set }.run().unwrap();
            let routed = &routed;
            assert_eq!((routed.tokens(), routed.num_experts()), (tokens, n));
            assert_eq!(routed.mask.shaped(tokens, n).download().unwrap(), want.mask);
            assert_eq!(routed.active.download().unwrap(), want.active);
            let q = routed.gates.shaped(tokens, n).download().unwrap();
            check_close("gates", &q, &want.gates, |_| 1e-6);
            let close = |i: usize| 1e-6 * (1.0 + want.coefficients[i]);
            check_close(
                "coefficients",
                &routed.coefficients().download().unwrap(),
                &want.coefficients,
                close,
            );

            let mut counts = gpu.zeros::<u64>(2 * n + 1).unwrap();
            let mut sums = gpu.zeros::<f64>(2).unwrap();
            let mut of_tokens = gpu.upload(&vec![5u32; tokens]).unwrap();
            let each = Some(&mut *of_tokens);
            router::Stats { counts: &mut counts, sums: &mut sums, of_tokens: each, routed }.run().unwrap();
            let more: Vec<u32> = want.active.iter().map(|k| 5 + k).collect();
            assert_eq!(of_tokens.download().unwrap(), more);
            let mut expected = vec![0u64; 2 * n + 1];
            for (at, &on) in want.mask.iter().enumerate() {
                expected[at % n] += u64::from(on);
            }
            for &k in &want.active {
                expected[n + k as usize] += 1;
            }
            assert_eq!(counts.download().unwrap(), expected);
            let all: f64 = want.gates.iter().sum();
            let of_active: f64 =
                want.gates.iter().zip(&want.mask).filter(|(_, on)| **on != 0).map(|(q, _)| q).sum();
            let sums = sums.download().unwrap();
            let close = 1e-6 * (1.0 + all);
            assert!((sums[0] - of_active).abs() < close && (sums[1] - all).abs() < close, "{sums:?}");

            let dk = to_f32(&values(tokens * n, 6));
            let dcoefficients = &gpu.upload(&dk).unwrap();
            let weight = &gpu.upload(&[0.25f32]).unwrap();
            for over in [Over::Active, Over::All, Over::Held] {
                let sparsity = Sparsity { weight, factor: 1.5, over };
                let mut want_dz: Vec<f64> = (0..tokens * n)
                    .map(|at| {
                        let (q, on, k) = (want.gates[at], want.mask[at] != 0, want.active[at / n]);
                        let scale = if set.rescale { n as f64 / f64::from(k.max(1)) } else { 1.0 };
                        let passes = set.ste || (on && !set.binary);
                        let mut dq = if passes { scale * f64::from(dk[at]) } else { 0.0 };
                        if (on && over == Over::Active) || over == Over::All {
                            dq += 0.25 * 1.5;
                        }
                        dq * q * (1.0 - q)
                    })
                    .collect();
                if over == Over::Held {
                    let slope = |q: f64| q * (1.0 - q);
                    let slopes: f64 = want.gates.iter().map(|&q| slope(q)).sum();
                    let shift = 0.25 * 1.5 - want_dz.iter().sum::<f64>() / slopes;
                    want_dz.iter_mut().zip(&want.gates).for_each(|(dz, &q)| *dz += shift * slope(q));
                }
                let mut dz = gpu.zeros::<f32>(tokens * n).unwrap();
                let held = &mut gpu.upload(&[f32::NAN]).unwrap();
                router::Backward { dz: &mut dz, dcoefficients, routed, sparsity, held, gates: &set }
                    .run()
                    .unwrap();
                check_close("dlogits", &dz.download().unwrap(), &want_dz, |_| 1e-5);
            }
        }

        let dz = to_f32(&values(tokens * n, 7));
        let dz_on = &gpu.upload(&dz).unwrap();
        let run = || {
            let (dz, drouter) = (dz_on, &mut gpu.upload(&vec![1.0f32; n * hidden]).unwrap());
            let mut db = gpu.upload(&vec![2.0f32; n]).unwrap();
            let dbias = Some(&mut *db);
            let partials = &mut gpu.zeros::<f32>(router::partials_len(hidden, n)).unwrap();
            router::BackwardWeights { drouter, dbias, dz, normed, partials }.run().unwrap();
            let mut dh = gpu.upload_rows(&vec![3.0f32; tokens * hidden], hidden).unwrap();
            router::BackwardInput { dh: &mut dh, dz, router }.run().unwrap();
            (drouter.download().unwrap(), db.download().unwrap(), dh.download().unwrap())
        };
        let (dw, db, dh) = run();
        let (mut want_w, mut want_b) = (vec![1.0f64; n * hidden], vec![2.0f64; n]);
        let mut want_h = vec![3.0f64; tokens * hidden];
        for t in 0..tokens {
            for e in 0..n {
                let d = f64::from(dz[t * n + e]);
                want_b[e] += d;
                for i in 0..hidden {
                    want_w[e * hidden + i] += d * h(t, i);
                    want_h[t * hidden + i] += d * f64::from(w[e * hidden + i]);
                }
            }
        }
        check_close("drouter", &dw, &want_w, |_| 1e-5 * (1.0 + tokens as f64).sqrt());
        check_close("dbias", &db, &want_b, |_| 1e-5 * (1.0 + tokens as f64).sqrt());
        check_close("dh", &dh, &want_h, |_| 1e-5 * (1.0 + n as f64).sqrt());
        assert_eq!(run(), (dw, db, dh), "other bits the second time");
    }
}

#[test]
fn cuda_routing_lists_are_in_the_order_of_the_tokens() {
    let Some(gpu) = gpu_or_skip("cuda_routing_lists_are_in_the_order_of_the_tokens") else { return };
    for (tokens, n) in [(0, 3), (1, 1), (63, 8), (64, 7), (129, 5), (3000, 64)] {
        let z: Vec<f32> = to_f32(&values(tokens * n, 8));
        let want = want(&z, THRESHOLDS, gates(n));
        let z = gpu.upload(&z).unwrap();
        let mut routed = Routed::with_room(&gpu, tokens, n).unwrap();
        let (gates, z_on, thresholds) = (&gates(n), &z, &gpu.upload(&THRESHOLDS).unwrap());
        router::Route { routed: &mut routed, z: z_on, thresholds, gates }.run().unwrap();
        // Room for more pairs.
        let mut lists = Lists::with_room(&gpu, tokens, n + 2).unwrap();
        router::Sort { lists: &mut lists, routed: &routed }.run().unwrap();
        let (mut offsets, mut list) = (vec![0u32], Vec::new());
        let mut slot = vec![0u32; tokens * n];
        for e in 0..n {
            for t in (0..tokens).filter(|t| want.mask[t * n + e] != 0) {
                slot[t * n + e] = list.len() as u32;
                list.push(t as u32);
            }
            offsets.push(list.len() as u32);
        }
        let (mut token_offsets, mut slots) = (vec![0u32], Vec::new());
        for t in 0..tokens {
            slots.extend((0..n).filter(|e| want.mask[t * n + e] != 0).map(|e| slot[t * n + e]));
            token_offsets.push(slots.len() as u32);
        }
        assert_eq!(lists.num_experts(), n);
        assert_eq!(lists.offsets.download().unwrap()[..=n], offsets, "{tokens} tokens, {n} experts");
        assert_eq!(lists.token_offsets.download().unwrap(), token_offsets);
        assert_eq!(lists.tokens.download().unwrap()[..list.len()], list);
        assert_eq!(lists.slots.download().unwrap()[..slots.len()], slots);

        // The same routing from the host, where there is room for more tokens and more experts.
        let coefficients = routed.coefficients().download().unwrap();
        let mut hosted = Routed::with_room(&gpu, tokens + 1, n + 2).unwrap();
        let more = &gpu.zeros::<f32>((tokens + 1) * n).unwrap();
        router::Route { routed: &mut hosted, z: more, thresholds, gates }.run().unwrap();
        hosted.set(n, &want.mask, &coefficients).unwrap();
        assert_eq!((hosted.tokens(), hosted.num_experts()), (tokens, n));
        assert_eq!(hosted.coefficients().download().unwrap(), coefficients);
        assert_eq!(hosted.mask.shaped(tokens, n).download().unwrap(), want.mask);
        assert_eq!(hosted.active.part(0..tokens).download().unwrap(), want.active);
        assert_eq!(hosted.gates.shaped(tokens, n).download().unwrap(), vec![0.0; tokens * n]);
        // A layer of more experts follows, for fewer tokens.
        let few: Vec<u8> = (0..n + 2).map(|e| u8::from(e == n)).collect();
        let factors: Vec<f32> = few.iter().map(|&on| 0.5 * f32::from(on)).collect();
        hosted.set(n + 2, &few, &factors).unwrap();
        assert_eq!((hosted.tokens(), hosted.num_experts()), (1, n + 2));
        assert_eq!(hosted.coefficients().download().unwrap(), factors);
        assert_eq!(hosted.active.part(0..1).download().unwrap(), [1]);
    }
}

#[test]
fn cuda_logits_are_counted_in_bins() {
    let Some(gpu) = gpu_or_skip("cuda_logits_are_counted_in_bins") else { return };
    let mut z: Vec<f32> = to_f32(&values(1000, 9)).iter().map(|x| 3.0 * x).collect();
    z.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -2.0, 2.0, -0.0]);
    // Bins of a quarter from -2 to 2.
    let mut want = vec![1u64; 16];
    for &z in &z {
        want[(((f64::from(z) + 2.0) * 4.0) as usize).min(15)] += 1;
    }
    let mut bins = gpu.upload(&[1u64; 16]).unwrap();
    router::CountLogits { bins: &mut bins, z: &gpu.upload(&z).unwrap(), per_unit: 4.0 }.run().unwrap();
    assert_eq!(bins.download().unwrap(), want);
}
