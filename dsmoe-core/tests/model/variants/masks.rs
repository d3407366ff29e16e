//! Masked linears: their file, what it refuses, and what they count.

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Dtype, Manifest, Sums, TensorInfo, Writer, tensor_names};
use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::init::preset;
use dsmoe_core::masks::MASKS_FILE;
use dsmoe_core::{Inference, Masks, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::refused;

use super::{HIDDEN, INTERMEDIATE, config, fill};

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

/// Every third weight of every linear is not kept.
fn thirds(model: &Model) -> Masks {
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(model.config()).filter(|(name, _)| name.ends_with("_proj.weight")) {
        masks.insert(name, shape[0], shape[1], |row, col| (row + col) % 3 != 0);
    }
    masks
}

fn masked() -> Model {
    let mut model = Model::new(config());
    fill(&mut model, 9);
    let masks = thirds(&model);
    model.set_masks(masks).unwrap();
    model
}

#[test]
fn bits_are_lowest_first_in_rows_as_stored() {
    let mut masks = Masks::new();
    masks.insert(DOWN, HIDDEN, INTERMEDIATE, |row, col| row == 2 && [0, 9, 19].contains(&col));
    let dir = tempfile::tempdir().unwrap();
    masks.save(dir.path()).unwrap();
    let bytes = std::fs::read(dir.path().join(MASKS_FILE)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(DOWN).unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (safetensors::Dtype::U8, &[HIDDEN, 3][..]));
    let mut want = vec![0u8; 3 * HIDDEN];
    want[6..9].copy_from_slice(&[0b0000_0001, 0b0000_0010, 0b0000_1000]);
    assert_eq!(tensor.data(), want);
    assert_eq!((masks.kept(), masks.pruned()), (3, (HIDDEN * INTERMEDIATE) as u64 - 3));
    assert!(masks.get(DOWN).unwrap().keeps(2, 9) && !masks.get(DOWN).unwrap().keeps(2, 8));
}

#[test]
fn applying_zeroes_what_is_not_kept_and_nothing_else() {
    let model = masked();
    let masks = model.masks().unwrap();
    let mut arena = Buf::zeros(model.layout().len());
    arena.fill(1.0);
    assert!(masks.first_nonzero(&arena, model.layout()).is_some());
    masks.apply(&mut arena, model.layout());
    assert_eq!(masks.first_nonzero(&arena, model.layout()), None);
    for entry in model.layout().entries() {
        let width = *entry.spec.shape.last().unwrap();
        // Rows and columns change places between memory and file, and their sum does not.
        let is_linear = entry.spec.name.ends_with("_proj.weight");
        for (i, &x) in arena[entry.range.clone()].iter().enumerate() {
            let pruned = is_linear && (i / width + i % width).is_multiple_of(3);
            assert_eq!(x, if pruned { 0.0 } else { 1.0 }, "{} {i}", entry.spec.name);
        }
    }
    let down = &model.layout().get(DOWN).unwrap().range;
    arena[down.start + HIDDEN] = 3.0;
    // Memory row 1, column 0: stored row 0, column 1, which is kept.
    assert_eq!(masks.first_nonzero(&arena, model.layout()), None);
    arena[down.start + 2 * HIDDEN + 1] = 3.0;
    assert_eq!(masks.first_nonzero(&arena, model.layout()), Some((DOWN, [1, 2])));
}

#[test]
fn directories_keep_masks() {
    let model = masked();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("model")).unwrap();
    model.save(&at("model"), Dtype::F32).unwrap();
    let back = Model::load(&at("model")).unwrap();
    assert_eq!((back.params(), back.masks()), (model.params(), model.masks()));
    assert_eq!(Masks::load(&at("model")).unwrap().as_ref(), model.masks());
    let to_bf16 = ExportOptions { dtype: Some(Dtype::BF16), ..ExportOptions::new(ExportAs::Native) };
    export(&at("model"), &at("copy"), &to_bf16, &mut |_| {}).unwrap();
    assert_eq!(Model::load(&at("copy")).unwrap().masks(), model.masks());
    let mut options = ConvertOptions::new(4);
    convert(&at("model"), &at("moe"), &options, &mut |_| {}).unwrap();
    assert_eq!(Model::load(&at("moe")).unwrap().masks(), model.masks());
    options.partition = PartitionSpec::Random;
    let converted = convert(&at("model"), &at("mixed"), &options, &mut |_| {});
    refused(converted, &[MASKS_FILE, "use a contiguous partition"]);
    assert!(!at("mixed").exists());
}

/// A directory of a model that is not masked, with a masks file of one tensor.
fn with_masks_file(name: &str, dtype: Dtype, shape: &[usize], byte: u8) -> tempfile::TempDir {
    let mut model = Model::new(config());
    fill(&mut model, 9);
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), Dtype::F32).unwrap();
    let info = TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() };
    let bytes = vec![byte; info.len_bytes() as usize];
    let mut writer = Writer::create_file(&dir.path().join(MASKS_FILE), vec![info]).unwrap();
    writer.write(name, &bytes).unwrap();
    writer.finish().unwrap();
    dir
}

#[test]
fn masks_of_another_model_are_refused() {
    let check = |name: &str, dtype: Dtype, shape: &[usize], byte: u8, parts: &[&str]| {
        let dir = with_masks_file(name, dtype, shape, byte);
        refused(Model::load(dir.path()), parts);
        refused(Inference::load(dir.path(), Precision::F32), parts);
    };
    let (other, embedding) = ("model.layers.7.mlp.up_proj.weight", "model.embed_tokens.weight");
    let no_linear = [MASKS_FILE, "layers.7", "is no linear", "remove the file"];
    check(other, Dtype::U8, &[INTERMEDIATE, 2], 255, &no_linear);
    check(embedding, Dtype::U8, &[29, 2], 255, &[MASKS_FILE, "embed_tokens", "is no linear"]);
    let shapes = [MASKS_FILE, "down_proj", "is U8 [16, 2] and not U8 [16, 3]"];
    check(DOWN, Dtype::U8, &[HIDDEN, 2], 255, &shapes);
    check(DOWN, Dtype::I8, &[HIDDEN, 3], 1, &["down_proj", "is I8 [16, 3] and not U8"]);
    check(DOWN, Dtype::U8, &[HIDDEN, 3], 255, &["down_proj", "bits behind its 20 columns"]);
    // Whole masks, of weights that are not 0 there: one read by rows, one transposed.
    let by_rows = ["model.safetensors", "q_proj", "is not 0 at row 0, column 1", MASKS_FILE];
    check(Q, Dtype::U8, &[24, 2], 0b1111_1101, &by_rows);
    let by_columns = ["model.safetensors", "down_proj", "is not 0 at row 0, column 2"];
    check(DOWN, Dtype::U8, &[HIDDEN, 3], 0b0000_1011, &by_columns);

    let mut model = Model::new(config());
    let mut masks = Masks::new();
    masks.insert(DOWN, INTERMEDIATE, HIDDEN, |_, _| true);
    refused(model.set_masks(masks), &["down_proj", "has shape [20, 16]", "says [16, 20]"]);
}

/// Without its masks the model would be trained as a dense one.
#[test]
fn a_model_that_has_lost_its_masks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    masked().save(dir.path(), Dtype::F32).unwrap();
    let file = dir.path().join(MASKS_FILE);
    let check = |parts: &[&str]| {
        refused(Model::load(dir.path()), parts);
        refused(Inference::load(dir.path(), Precision::F32), parts);
        refused(Masks::load(dir.path()), parts);
    };
    std::fs::remove_file(&file).unwrap();
    assert!(Model::load(dir.path()).unwrap().masks().is_none(), "nothing says that there were masks");
    let irregular = [MASKS_FILE, "is not a regular file", "remove it"];
    std::fs::create_dir(&file).unwrap();
    check(&irregular);
    std::fs::remove_dir(&file).unwrap();
    #[cfg(unix)]
    for target in ["nothing", "/dev/zero"] {
        std::os::unix::fs::symlink(target, &file).unwrap();
        check(&irregular);
        std::fs::remove_file(&file).unwrap();
    }
    masked().masks().unwrap().save(dir.path()).unwrap();
    Manifest::write(dir.path(), &Sums::default()).unwrap();
    assert!(Model::load(dir.path()).unwrap().masks().is_some());
    std::fs::remove_file(&file).unwrap();
    check(&[MASKS_FILE, "is missing and checksums.json beside it has it", "copy the model again"]);
    Manifest::forget(dir.path(), MASKS_FILE).unwrap();
    assert!(Model::load(dir.path()).unwrap().masks().is_none());
}

#[test]
fn kept_weights_are_what_is_activated() {
    // One layer of the 1B model: half of attention's rows, a quarter of the FFN's.
    let config = preset("llama-3.2-1b").unwrap();
    let counts = Accounting::of(&config);
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(&config) {
        if name.starts_with("model.layers.3.") && name.ends_with("_proj.weight") {
            let of = if name.contains("mlp") { 4 } else { 2 };
            masks.insert(name, shape[0], shape[1], |row, _| row % of == 0);
        }
    }
    let left = counts.with_masks(&masks);
    let pruned = 10_485_760 / 2 + 50_331_648 / 4 * 3;
    assert_eq!((masks.pruned(), masks.kept()), (pruned, 10_485_760 + 50_331_648 - pruned));
    assert_eq!((left.total, left.activated(0.0)), (1_235_814_400, (1_235_814_400 - pruned) as f64));
    assert_eq!(counts.flops_per_token(0.0, 9.0) - left.flops_per_token(0.0, 9.0), 2.0 * pruned as f64);

    let model = masked();
    let kept = Accounting::of(model.config()).total - model.masks().unwrap().pruned();
    assert_eq!(model.accounting().activated(0.0), kept as f64);
    assert_eq!(Inference::new(&model, Precision::F32).accounting(), &model.accounting());
}
