//! Profiles that hold, and ones that are refused.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// An edit replaces a byte, removes a range, or inserts digits.
    #[test]
    fn edited_profiles_are_read_or_refused_with_their_place(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3, 0usize..24), 1..6)
    ) {
        let mut bytes = text("quick").unwrap().as_bytes().to_vec();
        for (at, byte, kind, span) in edits {
            let at = at.index(bytes.len());
            let end = bytes.len().min(at + span);
            match kind {
                0 => bytes[at] = byte,
                1 => drop(bytes.drain(at..end)),
                _ => drop(bytes.splice(at..at, b"9".repeat(span))),
            }
        }
        if let Err(error) = Profile::parse(&String::from_utf8_lossy(&bytes), "p.toml") {
            let message = format!("{error:#}");
            prop_assert!(message.starts_with("p.toml: "), "{}", message);
        }
    }
}

fn row<'a>(profile: &'a Profile, name: &str) -> &'a MethodSpec {
    profile.method.iter().find(|spec| spec.name == name).unwrap()
}

#[test]
fn embedded_profiles_are_sound() {
    for name in names().into_iter().filter(|name| !name.starts_with("related")) {
        let profile = Profile::load(name).unwrap();
        assert_eq!(profile.name, name);
        for spec in &profile.method {
            profile.train_of(spec, 2, Some(profile.active)).unwrap().resolve().unwrap();
        }
    }
}

#[test]
fn methods_with_experts_have_the_profiles_number_or_their_own() {
    let make = "make = \"dsmoe-paper\"";
    let text = text("quick").unwrap().replacen("experts = 8", "experts = 4", 1);
    let text = text.replacen(make, &format!("{make}\nsettings = {{ experts = 22 }}"), 1);
    let profile = Profile::parse(&text, "p.toml").unwrap();
    let experts = |name: &str| profile.experts_of(row(&profile, name)).unwrap();
    for name in ["llama-moe", "moefication", "random-k", "dsmoe", "dsmoe-no-ste"] {
        assert_eq!(experts(name), Some(4), "{name}");
    }
    assert_eq!((experts("dsmoe-paper"), experts("wanda")), (Some(22), None));
}

/// The FFN has 88 neurons, so that 22 experts of 4 neurons and 8 experts of 11 fit.
#[test]
fn rows_with_other_numbers_of_experts_meet_one_budget() {
    let control = "[[method]]\nname = \"many\"\nrole = \"control\"\nmake = \"dsmoe-paper\"\nsettings = { experts = 22 }\n";
    let text = text("quick").unwrap().replacen("intermediate = 384", "intermediate = 88", 1);
    let profile = Profile::parse(&format!("{text}\n{control}"), "p.toml").unwrap();
    let dense = profile.architecture(1536).unwrap();
    let counts = Accounting::of(&dense);
    let routers = 6.0 * 128.0 * 8.0;
    let budget = counts.non_ffn as f64 + 0.375 * counts.ffn as f64 + routers;
    assert_eq!(profile.budget(&dense).unwrap(), budget);
    let active = |name: &str| {
        let spec = row(&profile, name);
        let active = profile.target_of(spec, &dense).unwrap().unwrap();
        let experts = profile.experts_of(spec).unwrap().unwrap();
        let activated = Accounting::of(&gated(&dense, experts)).activated(active * experts as f64);
        assert!((activated / budget - 1.0).abs() < 1e-9, "{name}: {activated}");
        active
    };
    assert_eq!(active("dsmoe-paper"), 0.375);
    assert!(active("many") < 0.375);
}

#[test]
fn sizes_of_the_model_are_named_as_the_profile_does() {
    for (from, to, wanted) in [
        ("hidden = 128", "hidden = 0", "model.hidden "),
        ("intermediate = 384", "intermediate = 0", "model.intermediate "),
        ("heads = 4", "heads = 3", "model: 3 heads do not divide a width of 128"),
    ] {
        let text = text("quick").unwrap();
        assert!(text.contains(from), "{from}");
        let profile = Profile::parse(&text.replacen(from, to, 1), "p.toml").unwrap();
        let message = format!("{:#}", profile.architecture(1536).unwrap_err());
        assert!(message.starts_with(wanted) && !message.contains("config.json"), "{message}");
    }
}

#[test]
fn what_a_profile_cannot_say() {
    let with = |from: &str, to: &str| text("quick").unwrap().replacen(from, to, 1);
    let control = |row: &str| {
        format!("{}\n[[method]]\nname = \"x\"\nrole = \"control\"\n{row}\n", text("quick").unwrap())
    };
    let as_dsmoe = with("\"dsmoe-no-ste\"\nrole", "\"x\"\nrole").replacen("\"dsmoe-no-ste\"", "\"dsmoe\"", 1);
    let shares: Vec<f64> = (1..=2000).map(|i| f64::from(i) / 2000.0).collect();
    for (text, parts) in [
        (with("", "bogus = 1\n"), &["p.toml: line 1", "unknown field `bogus`"][..]),
        (with("windows =", "windos ="), &["p.toml: line", "windos"]),
        (with("[train]", "[train]\nbogus = 1"), &["train", "bogus"]),
        (control("make = \"nothing\""), &["nothing"]),
        (control("make = \"wanda\"\nsettings = { order = \"taylor\" }"), &["order", "not a setting"]),
        (as_dsmoe, &["WithoutSte", "dsmoe-no-ste"]),
        (with("settings =", "knobs ="), &["p.toml: line", "`knobs` is now `settings`"]),
        (with("train = { lr", "train = { bogus = 1, lr"), &["p.toml: line", "bogus"]),
        (with("noise = false", "noise = \"perhaps\""), &["llama-moe", "noise", "perhaps"]),
        (with("seeds = 1", "seeds = 0"), &["seeds is 0"]),
        (with("\"wanda\"\n", "\"dsmoe\"\n"), &["two methods have the name \"dsmoe\""]),
        (
            with("", &format!("budgets = {shares:?}\n")),
            &["p.toml: budgets has 2000 entries; use at most 1000"],
        ),
    ] {
        let error = format!("{:#}", Profile::parse(&text, "p.toml").unwrap_err());
        assert!(parts.iter().all(|part| error.contains(part)), "{error}: {parts:?}");
    }
}
