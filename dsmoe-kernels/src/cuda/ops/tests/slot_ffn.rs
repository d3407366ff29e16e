//! The passes of an FFN over slots: the launches that they are made of, for many shapes, and whole passes in the model of a device
//! against the definition of the op.

mod launches;
mod passes;

use crate::cuda::ops::choice::Variants;
use crate::cuda::ops::products::Variant;

const DEFAULT: Variants = Variants {
    up: Variant::DEFAULT,
    project: Variant::DEFAULT,
    down: Variant::DEFAULT,
    input: Variant::DEFAULT,
    weights: Variant::DEFAULT,
};
const TURNED: Variant = Variant { turned: true, ..Variant::DEFAULT };
const MOSTLY_TURNED: Variants =
    Variants { up: TURNED, project: TURNED, down: TURNED, input: TURNED, weights: Variant::DEFAULT };
