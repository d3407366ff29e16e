//! The text of `--version`.

use std::fmt::Write as _;
use std::sync::OnceLock;

use dsmoe_kernels::Isa;

/// The features that change what the program can do, and whether it has them.
const FEATURES: [(&str, bool); 3] =
    [("cuda", cfg!(feature = "cuda")), ("hub", cfg!(feature = "hub")), ("mpi", cfg!(feature = "mpi"))];

/// Returns the text of `--version` after the program's name: version, revision, compiler, features, and the kernels' tiers
/// on this processor.
pub(crate) fn long() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(text)
}

fn text() -> String {
    let named = |wanted: bool| {
        let names: Vec<&str> =
            FEATURES.iter().filter(|(_, has)| *has == wanted).map(|(name, _)| *name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let mut out = env!("CARGO_PKG_VERSION").to_owned();
    let mut field = |title: &str, value: &str| write!(out, "\n{title:<9} {value}").expect("a String grows");
    field("revision", env!("DSMOE_REVISION"));
    field("compiler", env!("DSMOE_RUSTC"));
    field("features", &format!("{}; not built in: {}", named(true), named(false)));
    let tiers: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    field(
        "kernels",
        &format!(
            "{} of {} on this {} processor",
            Isa::current().name(),
            tiers.join(", "),
            std::env::consts::ARCH
        ),
    );
    out
}
