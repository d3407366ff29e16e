//! Routes against transformers with MLPs that give zeros, and an oracle that is interrupted.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use dsmoe_core::config::MoeConfig;
use dsmoe_core::init::preset;
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::shared;
use dsmoe_router::RouterConfig;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    seq: usize,
    losses: BTreeMap<String, Vec<f32>>,
}

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/oracle.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn options(seq: usize) -> OracleOptions {
    let exact_up_to = MOST_ROUTES;
    OracleOptions { exact_up_to, control: false, seed: 1, ..OracleOptions::new(RouteKind::BigSkip, seq) }
}

/// Runs an oracle over a model whose weights are loaded from `dir`.
fn found(
    dir: &Path,
    ids: &[u32],
    options: OracleOptions,
    state: Option<&Path>,
    watch: &mut OracleProgress<'_>,
) -> Result<(OracleReport, TokenRoutes)> {
    let mut model = Inference::load(dir, Precision::F32)?;
    let source = || Ok(Model::load(dir)?);
    let made_by = "a test";
    run(Oracle { model: &mut model, source: &source, ids, options, state, made_by }, watch)
}

/// A DSMoE model of four layers of four experts whose weights are large enough to matter.
fn mixture(dir: &Path) -> PathBuf {
    let mut config = preset("tiny").unwrap();
    config.moe = Some(MoeConfig::new(RouterConfig::new(4)));
    let mut model = Model::new(config);
    let len = model.params().len();
    let mut noise = vec![0.0; len];
    Rng::new(3, 0).fill_normal(&mut noise, 0.3);
    model.params_mut().iter_mut().zip(&noise).for_each(|(p, e)| *p += e);
    let out = dir.join("mixture");
    std::fs::create_dir_all(&out).unwrap();
    model.save(&out, dsmoe_core::checkpoint::Dtype::F32).unwrap();
    out
}

fn text(tokens: usize, vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(9, 0);
    (0..tokens).map(|_| rng.below(vocab as u64) as u32).collect()
}

#[test]
fn routes_have_the_losses_of_transformers_and_an_oracle_the_least() {
    let Some(dir) = shared("oracle", "models/babyllama-1m") else { return };
    let (dir, Golden { ids, seq, losses }) = (dir.join("models/babyllama-1m"), golden());
    let mut model = Inference::load(&dir, Precision::F32).unwrap();
    let space = RouteSpace::of(RouteKind::BigSkip, &model).unwrap();
    assert_eq!((losses.len(), space.count(32), space.levels()), (32, Some(32), 6));
    let mut largest = 0.0f32;
    let mut least = vec![f32::INFINITY; ids.len() / seq * (seq - 1)];
    for number in 0..32 {
        let digits = space.nth(number);
        model.set_routes(&space.routes(&digits)).unwrap();
        let got = measure(&model, &ids, seq).unwrap().losses;
        for ((got, want), least) in got.iter().zip(&losses[&name(&digits)]).zip(&mut least) {
            largest = largest.max((got - want).abs());
            *least = least.min(*got);
        }
    }
    assert!(largest < 1e-3, "{largest}");
    // The route of all FFNs is the model itself.
    let whole = measure(&model, &ids, seq).unwrap().losses;
    assert_eq!(whole, measure(&Inference::load(&dir, Precision::F32).unwrap(), &ids, seq).unwrap().losses);

    let (report, tokens) = found(&dir, &ids, options(seq), None, &mut |_, _, _| {}).unwrap();
    assert_eq!((report.exact, report.measured, tokens.loss.clone()), (true, 32, least.clone()));
    assert!((report.default - mean(&whole)).abs() < 1e-12 && tokens.default == whole);
    assert!((report.any.oracle - mean(&least)).abs() < 1e-12);
    let counts: Vec<u64> = report.levels.iter().map(|level| level.routes).collect();
    assert_eq!(counts, [1, 5, 10, 10, 5, 1]);
    for of in &report.levels {
        assert!(of.oracle <= of.best && of.best <= of.mean + 1e-12, "{of:?}");
        let want: f64 = losses
            .iter()
            .filter(|(route, _)| route.matches('1').count() == of.level)
            .map(|(_, losses)| mean(losses))
            .sum();
        assert!((of.mean - want / of.routes as f64).abs() < 1e-4, "{of:?}");
    }
    // A single route: the oracle has no choice.
    let ends = [&report.levels[0], &report.levels[5]];
    assert!(ends.iter().all(|of| of.oracle == of.best && of.best == of.mean), "{ends:?}");
    assert_eq!([&ends[0].best_route[..], &ends[1].best_route], ["00000", "11111"]);
    assert!(report.any.oracle < report.default && report.own_choice.is_none());
}

#[test]
fn a_control_has_the_mean_loss_of_its_level() {
    let Some(dir) = shared("oracle", "models/babyllama-1m") else { return };
    let (dir, Golden { ids, seq, .. }) = (dir.join("models/babyllama-1m"), golden());
    let with_control = OracleOptions { control: true, ..options(seq) };
    let (report, tokens) = found(&dir, &ids, with_control, None, &mut |_, _, _| {}).unwrap();
    let (without, same) = found(&dir, &ids, options(seq), None, &mut |_, _, _| {}).unwrap();
    assert_eq!(tokens, same);
    // No noise makes the model as bad as one whose FFNs are nearly all gone.
    for (of, plain) in report.levels.iter().zip(&without.levels) {
        assert_eq!(
            (of.oracle, of.control.is_some()),
            (plain.oracle, of.routes > 1 && of.mean < 7.0),
            "{of:?}"
        );
        if let Some(control) = of.control {
            // All ten copies are matched.
            assert!((control.mean / of.mean - 1.0).abs() < 0.01, "{of:?}");
            assert!(control.oracle < control.mean && control.noise > 0.0);
            assert_eq!(of.beyond, Some(control.oracle - of.oracle));
        }
    }
    let (control, beyond) = (report.any.control.unwrap(), report.any.beyond.unwrap());
    assert_eq!(beyond, control - report.any.oracle);
    assert_eq!(found(&dir, &ids, with_control, None, &mut |_, _, _| {}).unwrap().0, report);
}

#[test]
fn what_is_interrupted_goes_on_to_the_same_result() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let state = work.path().join("state");
    let vocab = Config::load(&dir).unwrap().vocab_size;
    let (ids, kind) = (text(40, vocab), RouteKind::BigSkip);
    for exact_up_to in [MOST_ROUTES, 1] {
        let options = OracleOptions { kind, exact_up_to, beam: 9, control: true, ..options(20) };
        let want = found(&dir, &ids, options, None, &mut |_, _, _| {}).unwrap();
        for (stop, at) in [("searching", 1), ("routes", 2), ("control", 2)] {
            if exact_up_to > 1 && stop == "searching" {
                continue;
            }
            let killed = catch_unwind(AssertUnwindSafe(|| {
                found(&dir, &ids, options, Some(&state), &mut |stage, done, _| {
                    assert!(stage != stop || done < at, "killed");
                })
            }));
            assert!(killed.is_err(), "{stop}");
            let mut first = None;
            let got = found(&dir, &ids, options, Some(&state), &mut |stage, done, _| {
                if stage == stop {
                    first.get_or_insert(done);
                }
            });
            assert_eq!(got.unwrap(), want);
            // Only a search of one layer begins again.
            assert!(stop == "searching" || first.is_some_and(|first| first >= at), "{stop}: {first:?}");
            assert!(!state.exists());
        }
    }
    // A file of other work, or one that is damaged, is no obstacle.
    for bytes in [&b"{}"[..], b"\xff", br#"{"made_by":"x","beams":[],"done":9,"levels":[],"controls":[]}"#] {
        std::fs::write(&state, bytes).unwrap();
        let options = OracleOptions { kind, ..options(20) };
        let want = found(&dir, &ids, options, None, &mut |_, _, _| {}).unwrap();
        assert_eq!(found(&dir, &ids, options, Some(&state), &mut |_, _, _| {}).unwrap(), want);
    }
}

/// The loss of the token after `window`, whose tokens are fed one by one on these routes.
fn one_by_one(model: &mut Inference, space: &RouteSpace, window: &[(u32, Digits)], target: u32) -> f32 {
    let (mut cache, mut workspace) = (Cache::new(model, window.len()), Workspace::default());
    let mut loss = 0.0;
    for (id, route) in window {
        model.set_routes(&space.routes(route)).unwrap();
        let logits = model.decode(&[*id], &mut cache, None, &mut workspace).unwrap();
        let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
        loss = (sum.ln() - f64::from(logits[target as usize])) as f32;
    }
    loss
}

/// Against tokens that are fed one by one, in the contexts where they do not take the route of the earlier ones.
#[test]
fn tokens_see_what_earlier_ones_took() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let (seq, ids) = (9, text(30, Config::load(&dir).unwrap().vocab_size));
    let mut model = Inference::load(&dir, Precision::F32).unwrap();
    let space = RouteSpace::of(RouteKind::BigSkip, &model).unwrap();
    let routes: Vec<Digits> = (0..16).map(|number| space.nth(number)).collect();
    for context in [RouteContext::Dense, RouteContext::Greedy] {
        let options = OracleOptions { context, ..options(seq) };
        let (report, tokens) = found(&dir, &ids, options, None, &mut |_, _, _| {}).unwrap();
        assert_eq!((report.context, report.measured, report.predicted), (context, 16, 26));
        let mut sums = [0.0; 16];
        let mut token = 0;
        for window in ids.chunks(seq) {
            let mut before: Vec<(u32, Digits)> = Vec::new();
            for pair in window.windows(2) {
                let mut least = f32::INFINITY;
                let mut losses = [0.0; 16];
                for ((route, loss), sum) in routes.iter().zip(&mut losses).zip(&mut sums) {
                    let window = [&before[..], &[(pair[0], route.clone())]].concat();
                    *loss = one_by_one(&mut model, &space, &window, pair[1]);
                    least = least.min(*loss);
                    *sum += f64::from(*loss) / 26.0;
                }
                let best = tokens.best[token] as usize;
                assert_eq!(tokens.routes[best], name(&routes[best]));
                let off = (tokens.loss[token] - losses[best]).abs().max((tokens.loss[token] - least).abs());
                assert!(off < 1e-4, "{context:?} token {token}: {} {losses:?}", tokens.loss[token]);
                let taken = if context == RouteContext::Dense { 15 } else { best };
                before.push((pair[0], routes[taken].clone()));
                token += 1;
            }
        }
        for of in &report.levels {
            let of_level = routes.iter().zip(sums).filter(|(route, _)| level(route) == of.level);
            let sums: Vec<f64> = of_level.map(|(_, sum)| sum).collect();
            let least = sums.iter().copied().fold(f64::INFINITY, f64::min);
            assert!((of.mean - sums.iter().sum::<f64>() / sums.len() as f64).abs() < 1e-4, "{of:?}");
            assert!((of.best - least).abs() < 1e-4 && of.oracle <= of.best + 1e-9, "{of:?} {least}");
        }
        // All FFNs of all tokens are the model by itself, if earlier tokens have them, too.
        let whole = report.levels[4].mean - report.default;
        assert_eq!(whole.abs() < 1e-4, context == RouteContext::Dense, "{whole}");
        // A search whose beams hold everything finds the same.
        let wide = OracleOptions { exact_up_to: 1, beam: 4096, ..options };
        let (searched, same) = found(&dir, &ids, wide, None, &mut |_, _, _| {}).unwrap();
        assert_eq!((searched.exact, searched.measured, same.loss), (false, 16, tokens.loss));
    }
    // Where all tokens are the first of their windows there is nothing to see.
    let [same, dense, greedy] =
        [RouteContext::Same, RouteContext::Dense, RouteContext::Greedy].map(|context| {
            let options = OracleOptions { context, ..options(2) };
            found(&dir, &ids, options, None, &mut |_, _, _| {}).unwrap().1.loss
        });
    assert_eq!(dense, greedy);
    assert!(same.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-4), "{same:?} {dense:?}");
}

#[test]
fn a_greedy_oracle_goes_on_behind_the_windows_that_are_done() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let state = work.path().join("state");
    // Nine windows run together, then three, then one of three inputs: 7, 7 and 3 positions.
    let text = text(100, Config::load(&dir).unwrap().vocab_size);
    let context = RouteContext::Greedy;
    for (stop, at, first, control) in
        [("routes", 10, 7, false), ("routes", 15, 14, false), ("control", 3, 3, true)]
    {
        // Noisy copies take many passes.
        let ids = &text[..if control { 20 } else { 100 }];
        let options = OracleOptions { context, control, budget: Some(1.5), ..options(8) };
        let want = found(&dir, ids, options, None, &mut |_, _, _| {}).unwrap();
        let killed = catch_unwind(AssertUnwindSafe(|| {
            found(&dir, ids, options, Some(&state), &mut |stage, done, _| {
                assert!(stage != stop || done < at, "killed");
            })
        }));
        assert!(killed.is_err(), "{stop}");
        let mut seen = None;
        let got = found(&dir, ids, options, Some(&state), &mut |stage, done, _| {
            if stage == stop {
                seen.get_or_insert(done);
            }
        });
        assert_eq!((got.unwrap(), seen), (want, Some(first)), "{stop}");
        assert!(!state.exists());
    }
}

#[test]
fn a_budget_is_one_of_every_token_or_of_their_mean() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let ids = text(40, Config::load(&dir).unwrap().vocab_size);
    let mut model = Inference::load(&dir, Precision::F32).unwrap();
    let space = RouteSpace::of(RouteKind::BigSkip, &model).unwrap();
    let mut losses = Vec::new();
    for number in 0..16 {
        model.set_routes(&space.routes(&space.nth(number))).unwrap();
        losses.push(measure(&model, &ids, 20).unwrap().losses);
    }
    let of = |budget: f64| {
        let options = OracleOptions { budget: Some(budget), ..options(20) };
        let (report, tokens) = found(&dir, &ids, options, None, &mut |_, _, _| {}).unwrap();
        (report.budget.unwrap(), tokens.budget.unwrap(), report)
    };
    let levels: Vec<usize> = (0..16).map(|number| level(&space.nth(number))).collect();
    for budget in [0.0, 0.5, 1.0, 2.25, 4.0] {
        let (BudgetReport { level, each, mean }, routes, report) = of(budget);
        assert_eq!((level, each.control, mean.beyond), (budget, None, None));
        let least = |token: usize| {
            let within = (0..16).filter(|&number| levels[number] as f64 <= budget);
            within.map(|number| losses[number][token]).fold(f32::INFINITY, f32::min)
        };
        assert!((each.oracle - mean_of((0..38).map(least))).abs() < 1e-9, "{budget}: {each:?}");
        for (found, routes) in [(each, &routes.each), (mean, &routes.mean)] {
            assert_eq!(routes.len(), 38);
            let taken = routes.iter().enumerate().map(|(token, &route)| losses[route as usize][token]);
            assert!((found.oracle - mean_of(taken)).abs() < 1e-9, "{budget}: {found:?}");
            let sum: usize = routes.iter().map(|&route| levels[route as usize]).sum();
            assert!((found.mean_level - sum as f64 / 38.0).abs() < 1e-12 && found.mean_level <= budget);
        }
        assert!(routes.each.iter().all(|&route| levels[route as usize] as f64 <= budget));
        assert!(mean.oracle <= each.oracle && report.any.oracle <= mean.oracle, "{budget}");
        assert!(!(1.0..4.0).contains(&budget) || mean.oracle < each.oracle, "{budget}");
        if budget == 0.0 {
            // No layer for any token is one route.
            assert_eq!((each.oracle, mean), (report.levels[0].best, each));
        }
        if budget == 4.0 {
            assert_eq!([each.oracle, mean.oracle], [report.any.oracle; 2]);
        }
    }
}

#[test]
fn experts_are_those_of_the_largest_gates() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let vocab = Config::load(&dir).unwrap().vocab_size;
    let ids = text(40, vocab);
    let kind = RouteKind::Experts;
    let (report, tokens) =
        found(&dir, &ids, OracleOptions { kind, ..options(20) }, None, &mut |_, _, _| {}).unwrap();
    assert_eq!((report.measured, report.levels.len(), report.exact), (625, 17, true));
    assert!(report.own_choice.is_some());
    let mut model = Inference::load(&dir, Precision::F32).unwrap();
    // All experts of all layers: a threshold of 0 opens them too.
    model.set_threshold(0.0).unwrap();
    let all = measure(&model, &ids, 20).unwrap();
    assert!((report.levels[16].mean - mean(&all.losses)).abs() < 1e-12);
    assert!(all.active.iter().all(|&n| n == 16));
    // Nothing at all.
    let mut model = Inference::load(&dir, Precision::F32).unwrap();
    model.set_routes(&[dsmoe_core::ffn::Route::Skip; 4]).unwrap();
    let none = measure(&model, &ids, 20).unwrap();
    assert!(none.active.iter().all(|&n| n == 0));
    assert!((report.levels[0].mean - mean(&none.losses)).abs() < 1e-12);
    // A search whose beams hold everything finds what enumeration does.
    let wide = OracleOptions { kind, exact_up_to: 1, beam: 4096, ..options(20) };
    let (searched, same) = found(&dir, &ids, wide, None, &mut |_, _, _| {}).unwrap();
    assert!(!searched.exact && searched.measured == 625);
    assert_eq!(same.loss, tokens.loss);
    let narrow = OracleOptions { beam: 1, ..wide };
    let (narrow, _) = found(&dir, &ids, narrow, None, &mut |_, _, _| {}).unwrap();
    assert!(narrow.any.oracle >= searched.any.oracle && narrow.measured < 625);
}

#[test]
fn what_cannot_be_is_one_line_with_the_help() {
    let work = tempfile::tempdir().unwrap();
    let dir = mixture(work.path());
    let model = Inference::load(&dir, Precision::F32).unwrap();
    let good = options(20);
    for (options, tokens, parts) in [
        (OracleOptions { kind: RouteKind::BigSmall, ..good }, 40, ["two choices in every layer", "big-skip"]),
        (OracleOptions { exact_up_to: 0, ..good }, 40, ["exact is 0", "1 to 65536"]),
        (OracleOptions { beam: 0, ..good }, 40, ["beam is 0", "1 to 4096"]),
        (OracleOptions { seq: 1 << 20, ..good }, 40, ["seq is 1048576", "max_position"]),
        (OracleOptions { seq: 1, ..good }, 40, ["1", "2"]),
        (OracleOptions { budget: Some(4.5), ..good }, 40, ["budget is 4.5", "0 to 4, the largest level"]),
        (OracleOptions { budget: Some(f64::NAN), ..good }, 40, ["budget is NaN", "0 to 4"]),
        (good, 1, ["1 token", ""]),
    ] {
        let error = plan(&model, tokens, &options).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
    }
    let dense = Inference::new(&Model::new(preset("tiny").unwrap()), Precision::F32);
    let error =
        plan(&dense, 40, &OracleOptions { kind: RouteKind::Experts, ..good }).unwrap_err().to_string();
    assert!(error.contains("a model of experts"), "{error}");
    assert!("skip".parse::<RouteKind>().unwrap_err().to_string().contains("big-skip, big-small or experts"));
    assert!("own".parse::<RouteContext>().unwrap_err().to_string().contains("same, dense or greedy"));
    // The plan is an upper bound of the work.
    let planned = plan(&model, 40, &OracleOptions { kind: RouteKind::Experts, ..good }).unwrap();
    assert_eq!(
        (planned.all_routes, planned.exact, planned.predicted, planned.passes),
        (Some(625), true, 38, 625)
    );
    for (context, more) in [(RouteContext::Dense, 1), (RouteContext::Greedy, 1)] {
        let options = OracleOptions { kind: RouteKind::Experts, context, ..good };
        assert_eq!(plan(&model, 40, &options).unwrap().passes, planned.passes + more);
    }
}
