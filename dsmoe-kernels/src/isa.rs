//! The instruction-set tier of the kernels, chosen at run time.

use std::sync::OnceLock;

use thiserror::Error;

/// Proves that AVX2 and FMA are present. Only [`Isa::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Proves that AVX-512 F, VL, BW and DQ are present. Only [`Isa::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proves that AVX512_BF16 is present in addition to [`Avx512`]. Only [`Isa::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Bf16(());

#[cfg(target_arch = "x86_64")]
impl Avx512Bf16 {
    /// Returns the proof for the features that this tier builds on.
    pub(crate) fn base(self) -> Avx512 {
        Avx512(())
    }
}

/// Proves that NEON is present. Only [`Isa::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

/// Proves that the instructions for bf16 (FEAT_BF16) are present in addition to [`Neon`]. Only [`Isa::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonBf16(());

#[cfg(target_arch = "aarch64")]
impl NeonBf16 {
    /// Returns the proof for the features that this tier builds on.
    pub(crate) fn base(self) -> Neon {
        Neon(())
    }
}

/// An instruction-set tier, with a proof that this machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Portable Rust, no intrinsics.
    Scalar,
    /// 8 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// 16 lanes, with bf16 instructions in matrix products.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// 8 lanes, in two registers of 128 bits.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    /// 8 lanes, with bf16 instructions in matrix products.
    #[cfg(target_arch = "aarch64")]
    NeonBf16(NeonBf16),
}

/// `DSMOE_ISA` names a tier that does not exist or that this machine lacks.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("DSMOE_ISA={asked} cannot be used; this machine has {available}")]
pub struct IsaError {
    asked: String,
    available: String,
}

impl Isa {
    /// Lists the tiers of this machine, narrowest first. [`Isa::Scalar`] is always among them.
    pub fn available() -> Vec<Isa> {
        let mut tiers = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                tiers.push(Isa::Avx2(Avx2(())));
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
            {
                tiers.push(Isa::Avx512(Avx512(())));
                if is_x86_feature_detected!("avx512bf16") {
                    tiers.push(Isa::Avx512Bf16(Avx512Bf16(())));
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            tiers.push(Isa::Neon(Neon(())));
            if std::arch::is_aarch64_feature_detected!("bf16") {
                tiers.push(Isa::NeonBf16(NeonBf16(())));
            }
        }
        tiers
    }

    /// Returns the fastest tier of this machine: the widest one, but without bf16 instructions where they are slower.
    /// Intel's cores issue one `vdpbf16ps` for every four fused multiply-adds, AMD's one for one. `bfdot` of Arm's cores has
    /// not been timed, so that it has to be asked for.
    pub fn best() -> Isa {
        let tiers = Isa::available();
        let widest = tiers[tiers.len() - 1];
        #[cfg(target_arch = "x86_64")]
        if let Isa::Avx512Bf16(token) = widest
            && !crate::simd::x86::is_amd()
        {
            return Isa::Avx512(token.base());
        }
        #[cfg(target_arch = "aarch64")]
        if let Isa::NeonBf16(token) = widest {
            return Isa::Neon(token.base());
        }
        widest
    }

    /// Returns the tier that `DSMOE_ISA` names, or [`Isa::best`] if the variable is not set.
    ///
    /// # Errors
    /// The named tier is unknown, or this machine lacks it.
    pub fn from_env() -> Result<Isa, IsaError> {
        let tiers = Isa::available();
        match std::env::var("DSMOE_ISA") {
            Err(_) => Ok(Isa::best()),
            Ok(asked) => tiers.iter().copied().find(|isa| isa.name() == asked).ok_or_else(|| IsaError {
                asked,
                available: tiers.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Returns the tier that the ops use by default. A binary calls [`Isa::from_env`] first, so that a wrong `DSMOE_ISA`
    /// is reported; otherwise a wrong value selects [`Isa::best`].
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::from_env().unwrap_or_else(|_| Isa::best()))
    }

    /// Returns `scalar`, `avx2`, `avx512`, `avx512bf16`, `neon` or `neonbf16`, the values of `DSMOE_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => "avx512bf16",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(_) => "neonbf16",
        }
    }

    /// Tells whether bf16 products run on pairs.
    pub(crate) fn dots(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self, Isa::Avx512Bf16(_));
        #[cfg(target_arch = "aarch64")]
        return matches!(self, Isa::NeonBf16(_));
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        false
    }

    /// Runs `kernel` compiled for this tier.
    pub(crate) fn run<K: crate::simd::Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Scalar => kernel.body(crate::simd::Portable),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(token) => crate::simd::x86::run_avx2(token, kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(token) => crate::simd::x86::run_avx512(token, kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(token) => crate::simd::x86::run_avx512(token.base(), kernel),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(token) => crate::simd::neon::run(token, kernel),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(token) => crate::simd::neon::run(token.base(), kernel),
        }
    }

    /// Runs a kernel of matrix products compiled for this tier.
    pub(crate) fn run_product<K: crate::simd::ProductKernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Scalar => kernel.body(crate::simd::Portable),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(token) => crate::simd::x86::run_product_avx2(token, kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(token) => crate::simd::x86::run_product_avx512(token, kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(token) => crate::simd::x86::run_product_avx512bf16(token, kernel),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(token) => crate::simd::neon::run_product(token, kernel),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(token) => crate::simd::neon::run_product_bf16(token, kernel),
        }
    }
}

#[cfg(all(test, target_arch = "aarch64"))]
mod tests {
    use super::Isa;
    use crate::testing::skipped;

    /// `scripts/check-aarch64` sets the variable. An emulator without bf16 would leave the tests of that tier out in silence.
    #[test]
    fn the_emulator_has_the_tier_with_bf16() {
        if std::env::var_os("DSMOE_TEST_STEP").is_none() {
            return skipped("the_emulator_has_the_tier_with_bf16", "not run by scripts/check-aarch64");
        }
        let tiers: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        assert!(tiers.contains(&"neonbf16"), "a newer emulator is needed; this one has {}", tiers.join(", "));
    }
}
