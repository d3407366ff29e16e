//! Values of every type, to the bit those of the reference.

use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::gguf::{Container, TensorType};

use super::read;
use dsmoe_kernels::testing::refused;
use dsmoe_kernels::testing::shared;

#[test]
fn every_type_gives_the_bits_of_the_reference() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let dir = shared.join("golden/gguf");
    let golden = Checkpoint::open_file(&dir.join("quants.safetensors")).unwrap();
    let mut types = 0;
    for file in ["quants.gguf", "quants-iq4.gguf"] {
        let checkpoint = Checkpoint::open(&dir.join(file)).unwrap();
        for name in checkpoint.names() {
            let view = checkpoint.tensor(name).unwrap();
            assert_eq!(view.stored_as().to_lowercase(), name);
            let (found, expected) = (read(&checkpoint, name), read(&golden, name));
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{name}");
            // Any part of it too, in whole elements.
            let whole = checkpoint.bytes(name).unwrap();
            let size = view.dtype.size();
            for (first, count) in [(0, 1), (31, 3), (255, 258), (700, 324), (1023, 1)] {
                let mut part = vec![0; count * size];
                checkpoint.read_at(view, (first * size) as u64, &mut part).unwrap();
                assert_eq!(part, whole[first * size..][..count * size], "{name} from {first}");
            }
            let row = view.rows(1, 1);
            let mut second = vec![0; row.len as usize];
            checkpoint.read_at(&row, 0, &mut second).unwrap();
            assert_eq!((&row.shape[..], &second[..]), (&[1, 512][..], &whole[512 * size..]), "{name}");
            let float = [Dtype::F32, Dtype::F16, Dtype::BF16].map(|dtype| dtype.to_string());
            assert!(view.dtype == Dtype::F32 || float.contains(&view.stored_as()), "{name}");
            types += 1;
        }
    }
    assert_eq!(types, 16);
}

#[test]
fn other_types_are_refused_by_name() {
    let Some(shared) = shared("gguf", "golden/gguf") else { return };
    let path = shared.join("golden/gguf/quants-other.gguf");
    let names: Vec<String> =
        Container::open(&path).unwrap().tensors.iter().map(|tensor| tensor.kind.to_string()).collect();
    assert_eq!(names, ["TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]);
    let message =
        ["quants-other.gguf: tensor tq1_0 is of type TQ1_0, which is not read", "use a file of Q8_0 or F16"];
    refused(Checkpoint::open(&path), &message);
    assert_eq!(TensorType::from_id(77).to_string(), "number 77");
}
