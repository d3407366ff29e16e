use super::gpu_or_skip;
use crate::comm::tree::sum_parts;
use crate::cuda::ops::tree::SumParts;
use crate::testing::normals;

#[test]
fn cuda_tree_has_the_bits_of_the_host() {
    let Some(gpu) = gpu_or_skip("cuda_tree_has_the_bits_of_the_host") else { return };
    for len in [1, 3, 4, 1021, 4096, 70_000] {
        for count in (1..=20).chain([64, 65, 130]) {
            let mut want = normals(count * len, len as u64);
            let mut parts = gpu.upload_rows(&want, len).unwrap();
            let mut out = gpu.zeros::<f32>(len).unwrap();
            SumParts { out: &mut out, parts: &mut parts }.run().unwrap();
            sum_parts(&mut want, len);
            assert!(out.download().unwrap() == want[..len], "{count} parts of {len} values");
        }
    }
}
