//! Checks of the sizes to measure.

use anyhow::{Result, bail};

use crate::memory;

/// The largest side of a tensor that is accepted.
const LARGEST: usize = 1 << 24;

/// Refuses a size that is 0 or too large.
pub(crate) fn check_size(flag: &str, size: usize) -> Result<()> {
    match size {
        0 => bail!("--{flag} 0; use at least 1"),
        1..=LARGEST => Ok(()),
        _ => bail!("--{flag} {size} is more than {LARGEST}; use a smaller one"),
    }
}

/// Refuses a prompt and new tokens that have more positions together than a model can have.
pub(crate) fn check_positions(prompt: usize, tokens: usize) -> Result<()> {
    check_size("prompt", prompt)?;
    check_size("tokens", tokens)?;
    let positions = prompt + tokens + 1;
    if positions > LARGEST {
        bail!(
            "--prompt {prompt} and --tokens {tokens} ask for {positions} positions, more than {LARGEST}; use fewer"
        );
    }
    Ok(())
}

/// Refuses experts that do not divide the width.
pub(crate) fn check_experts(experts: usize, intermediate: usize) -> Result<()> {
    if experts == 0 || !intermediate.is_multiple_of(experts) {
        bail!("--experts {experts} does not divide --intermediate {intermediate}; use a divisor");
    }
    Ok(())
}

pub(crate) fn check_active(active: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&active) {
        bail!("--active {active} is outside 0..1; use a share such as 0.375");
    }
    Ok(())
}

/// Refuses work whose tensors do not fit the machine.
pub(crate) fn check_memory(bytes: u128) -> Result<()> {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    memory::check("this shape", bytes, memory::total(), "use a smaller one")
}

pub(crate) fn check_core(core: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&core) {
        bail!("--core {core} is not a share; use 0 to 1");
    }
    Ok(())
}
