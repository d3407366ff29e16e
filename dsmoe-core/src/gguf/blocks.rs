//! The blocks of quantised tensors as f32.
//!
//! Elements are multiplied and added in the order of the format's definition, each product and sum rounded to f32, so
//! that every reader gets the same bits. `d` and `m` are f16. The low nibble of byte j of 16 is element j of 32, the high
//! nibble element j + 16.

use half::f16;
use rayon::prelude::*;

use super::types::{Layout, TensorType};

/// Elements of the largest block.
const LARGEST: usize = 256;
/// Blocks that one task decodes.
const TASK: usize = 1 << 9;
/// The values of the four bits of IQ4_NL and IQ4_XS.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of the four bits of MXFP4.
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Sets the f32s of `out`, as little-endian bytes, to those of `blocks` of `kind`.
///
/// # Panics
/// `kind` is not quantised, or the lengths do not fit.
pub(crate) fn decode_blocks(out: &mut [u8], blocks: &[u8], kind: TensorType) {
    let Some(Layout { elements, bytes }) = kind.layout() else { panic!("{kind} is not read") };
    assert_eq!(blocks.len() / bytes * elements * 4, out.len(), "decode: blocks of {kind} and f32s");
    assert!(blocks.len().is_multiple_of(bytes), "decode: whole blocks of {kind}");
    let decode = decoder(kind);
    out.par_chunks_mut(TASK * elements * 4).zip(blocks.par_chunks(TASK * bytes)).for_each(|(out, blocks)| {
        let mut values = [0.0; LARGEST];
        let values = &mut values[..elements];
        for (out, block) in out.chunks_exact_mut(elements * 4).zip(blocks.chunks_exact(bytes)) {
            decode(values, block);
            for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(&*values) {
                *out = value.to_le_bytes();
            }
        }
    });
}

/// Returns the function that decodes one block.
fn decoder(kind: TensorType) -> fn(&mut [f32], &[u8]) {
    match kind {
        TensorType::Q4_0 => q4_0,
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q4_K => q4_k,
        TensorType::Q5_K => q5_k,
        TensorType::Q6_K => q6_k,
        TensorType::IQ4_NL => iq4_nl,
        TensorType::IQ4_XS => iq4_xs,
        TensorType::MXFP4 => mxfp4,
        plain => panic!("decode: {plain} has no blocks"),
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Sets 32 values to `value` of the nibbles of 16 bytes.
fn nibbles(out: &mut [f32], bytes: &[u8], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&bytes[..16]) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}

fn q4_0(out: &mut [f32], block: &[u8]) {
    let d = half_at(block, 0);
    nibbles(out, &block[2..], |q| d * f32::from(q as i8 - 8));
}

fn q4_1(out: &mut [f32], block: &[u8]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(out, &block[4..], |q| d * f32::from(q) + m);
}

/// Sets 32 values to `value` of five bits: a nibble and one bit of the four bytes before the nibbles.
fn five_bits(out: &mut [f32], bytes: &[u8], value: impl Fn(u8) -> f32) {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (j, out) in out[..32].iter_mut().enumerate() {
        let byte = bytes[4 + j % 16];
        let nibble = if j < 16 { byte & 15 } else { byte >> 4 };
        *out = value(nibble | ((high >> j & 1) as u8) << 4);
    }
}

fn q5_0(out: &mut [f32], block: &[u8]) {
    let d = half_at(block, 0);
    five_bits(out, &block[2..], |q| d * f32::from(q as i8 - 16));
}

fn q5_1(out: &mut [f32], block: &[u8]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    five_bits(out, &block[4..], |q| d * f32::from(q) + m);
}

fn q8_0(out: &mut [f32], block: &[u8]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// Returns element j of 256 elements of two bits: fields of 64 bytes, 128 elements by 32 bytes.
fn two_bits(bytes: &[u8], j: usize) -> u8 {
    bytes[32 * (j / 128) + j % 32] >> (2 * (j % 128 / 32)) & 3
}

fn q2_k(out: &mut [f32], block: &[u8]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (g, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, offset) = (d * f32::from(scales[g] & 15), min * f32::from(scales[g] >> 4));
        for (i, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(two_bits(qs, 16 * g + i)) - offset;
        }
    }
}

fn q3_k(out: &mut [f32], block: &[u8]) {
    let (mask, qs, scales, d) = (&block[..32], &block[32..96], &block[96..108], half_at(block, 108));
    for (g, out) in out.chunks_exact_mut(16).enumerate() {
        let low = if g < 8 { scales[g] & 15 } else { scales[g - 8] >> 4 };
        let high = scales[8 + g % 4] >> (2 * (g / 4)) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        for (i, out) in out.iter_mut().enumerate() {
            let j = 16 * g + i;
            let missing = if mask[j % 32] >> (j / 32) & 1 == 1 { 0 } else { 4 };
            *out = scale * f32::from(two_bits(qs, j) as i8 - missing);
        }
    }
}

/// Returns scale and offset of group `g` of 8: six bits each in 12 bytes.
fn six_bit_pair(bytes: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        return (bytes[g] & 63, bytes[4 + g] & 63);
    }
    let (low, scale, offset) = (bytes[4 + g], bytes[g - 4] >> 6, bytes[g] >> 6);
    (low & 15 | scale << 4, low >> 4 | offset << 4)
}

/// Sets 256 values in groups of 32, with a scale and an offset each, to `value` of group, place and nibble.
fn scaled_groups(out: &mut [f32], block: &[u8], qs: &[u8], value: impl Fn(usize, usize, u8) -> u8) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    for (g, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = six_bit_pair(&block[4..16], g);
        let (scale, offset) = (d * f32::from(scale), min * f32::from(offset));
        for (i, (out, byte)) in out.iter_mut().zip(&qs[32 * (g / 2)..]).enumerate() {
            let nibble = if g % 2 == 0 { byte & 15 } else { byte >> 4 };
            *out = scale * f32::from(value(g, i, nibble)) - offset;
        }
    }
}

fn q4_k(out: &mut [f32], block: &[u8]) {
    scaled_groups(out, block, &block[16..], |_, _, q| q);
}

fn q5_k(out: &mut [f32], block: &[u8]) {
    let high = &block[16..48];
    scaled_groups(out, block, &block[48..], |g, i, q| q | (high[i] >> g & 1) << 4);
}

fn q6_k(out: &mut [f32], block: &[u8]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (g, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[g] as i8);
        for (i, out) in out.iter_mut().enumerate() {
            let j = 16 * g + i;
            let (half, field, at) = (j / 128, j % 128 / 32, j % 32);
            let byte = low[64 * half + 32 * (field % 2) + at];
            let nibble = if field < 2 { byte & 15 } else { byte >> 4 };
            let top = high[32 * half + at] >> (2 * field) & 3;
            *out = scale * f32::from((nibble | top << 4) as i8 - 32);
        }
    }
}

fn iq4_nl(out: &mut [f32], block: &[u8]) {
    let d = half_at(block, 0);
    nibbles(out, &block[2..], |q| d * f32::from(IQ4[usize::from(q)]));
}

fn iq4_xs(out: &mut [f32], block: &[u8]) {
    let (d, high, low) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]), &block[4..8]);
    for (g, out) in out.chunks_exact_mut(32).enumerate() {
        let nibble = if g % 2 == 0 { low[g / 2] & 15 } else { low[g / 2] >> 4 };
        let scale = nibble | ((high >> (2 * g) & 3) as u8) << 4;
        let scale = d * f32::from(scale as i8 - 32);
        nibbles(out, &block[8 + 16 * g..], |q| scale * f32::from(IQ4[usize::from(q)]));
    }
}

fn mxfp4(out: &mut [f32], block: &[u8]) {
    // The exponent of a power of two, and one less for the doubled values.
    let d = (f64::from(block[0]) - 128.0).exp2() as f32;
    nibbles(out, &block[1..], |q| d * f32::from(MXFP4[usize::from(q)]));
}

/// Appends the Q8_0 blocks of `values`, whose length is a multiple of 32.
///
/// # Errors
/// The largest of a block is too large for the f16 scale: it is returned.
pub(crate) fn encode_q8_0(out: &mut Vec<u8>, values: &[f32]) -> Result<(), f32> {
    let start = out.len();
    out.resize(start + values.len() / 32 * 34, 0);
    let blocks = out[start..].par_chunks_exact_mut(34).zip(values.par_chunks_exact(32));
    blocks.try_for_each(|(out, values)| {
        let largest = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let d = largest / 127.0;
        let scale = f16::from_f32(d);
        if scale.is_infinite() {
            return Err(largest);
        }
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        out[..2].copy_from_slice(&scale.to_le_bytes());
        for (out, x) in out[2..].iter_mut().zip(values) {
            *out = (x * inverse).round() as i8 as u8;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(kind: TensorType, blocks: &[u8]) -> Vec<f32> {
        let layout = kind.layout().unwrap();
        let mut out = vec![0; blocks.len() / layout.bytes * layout.elements * 4];
        decode_blocks(&mut out, blocks, kind);
        out.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    #[test]
    fn eight_bits_keep_every_value_to_half_a_step() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.0) / 7.0).collect();
        let mut blocks = Vec::new();
        encode_q8_0(&mut blocks, &values).unwrap();
        assert_eq!(blocks.len(), 68);
        for (block, values) in decode(TensorType::Q8_0, &blocks).chunks(32).zip(values.chunks(32)) {
            let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for (a, b) in block.iter().zip(values) {
                assert!((a - b).abs() <= largest / 127.0 * 0.51 + largest * 5e-4, "{a} {b}");
            }
        }
        let mut blocks = Vec::new();
        encode_q8_0(&mut blocks, &[0.0; 32]).unwrap();
        assert_eq!(decode(TensorType::Q8_0, &blocks), [0.0; 32]);
        let mut large = [0.0; 32];
        large[7] = -1e7;
        assert_eq!(encode_q8_0(&mut Vec::new(), &large), Err(1e7));
    }

    #[test]
    fn the_smallest_and_largest_exponent_of_mxfp4() {
        let mut block = [0x21; 17];
        for (exponent, expected) in [(0u8, (-128f64).exp2() as f32), (127, 0.5), (254, 126f32.exp2())] {
            block[0] = exponent;
            let values = decode(TensorType::MXFP4, &block);
            assert_eq!((values[0], values[16]), (expected, expected * 2.0));
        }
    }
}
