//! The choice of kernels: a table of shapes, and the model behind it against measurements and its own published numbers.

use super::super::choice::{
    Choice, Device, ExpertKernels, Passes, Variants, choose, dense_product, memory, product, times,
    weight_bytes,
};
use crate::cuda::ops::products::{Form, Variant};
use crate::cuda::ops::slots::Shape;

const H100: Device = Device { capability: (9, 0), multiprocessors: 132, shared_memory: 232_448 };
const TURNED: Variant = Variant { turned: true, ..Variant::DEFAULT };
const TRAINING: Passes = Passes::Training { all_pairs: false };
const ALL_PAIRS: Passes = Passes::Training { all_pairs: true };

/// Returns the shape of LLaMA 3.2 1B's FFN in experts.
fn shape(tokens: usize) -> Shape {
    Shape { tokens, hidden: 2048, width: 1024, num_experts: 8, core: 0 }
}

/// Shapes of several sizes, with and without a core.
fn shapes() -> Vec<Shape> {
    let sizes =
        [(2048, 1024, 8, 0), (4096, 1376, 8, 0), (256, 96, 8, 96), (2048, 256, 24, 2048), (8, 8, 1, 0)];
    let tokens = [1, 64, 300, 1024, 8192, 60_000];
    let of = |tokens| {
        sizes.map(|(hidden, width, num_experts, core)| Shape { tokens, hidden, width, num_experts, core })
    };
    tokens.into_iter().flat_map(of).collect()
}

#[test]
fn cuda_the_kernels_of_experts_are_lists_unless_others_are_asked_for() {
    assert_eq!(ExpertKernels::default(), ExpertKernels::Lists);
    assert_eq!(ExpertKernels::read(None).unwrap(), ExpertKernels::Lists);
    for shape in shapes() {
        for passes in [Passes::Inference, TRAINING, ALL_PAIRS] {
            for share in [0.0, 0.1, 0.375, 0.9, 1.0] {
                let found = choose(ExpertKernels::default(), &H100, &shape, passes, share);
                assert_eq!(found, Choice::Lists, "{shape:?}");
            }
        }
    }
}

#[test]
fn cuda_a_wrong_name_of_kernels_is_an_error() {
    for kernels in ExpertKernels::ALL {
        assert_eq!(ExpertKernels::read(Some(kernels.name().as_ref())).unwrap(), kernels);
    }
    for wrong in ["", "Slots", "dense", "slots "] {
        let error = ExpertKernels::read(Some(wrong.as_ref())).unwrap_err().to_string();
        let want = format!("DSMOE_EXPERT_KERNELS is {wrong:?}; set it to one of lists, slots, auto");
        assert_eq!(error, want);
    }
}

#[test]
fn cuda_devices_and_sizes_without_the_new_products_keep_lists() {
    let others = [
        Device { capability: (8, 0), multiprocessors: 108, shared_memory: 166_912 },
        Device { capability: (10, 0), multiprocessors: 148, ..H100 },
        Device { shared_memory: Variant::DEFAULT.shared_bytes() as u32 - 1, ..H100 },
    ];
    // Rows of weights that are no whole groups of 8 values, and places beyond 32 bits.
    let odd = [
        Shape { width: 1020, ..shape(1024) },
        Shape { hidden: 2044, ..shape(1024) },
        Shape { core: 4, ..shape(1024) },
        shape(1 << 22),
    ];
    for kernels in [ExpertKernels::Slots, ExpertKernels::Auto] {
        for device in &others {
            let found = choose(kernels, device, &shape(1024), TRAINING, 0.375);
            assert_eq!(found, Choice::Lists, "{device:?}");
        }
        for shape in &odd {
            assert_eq!(choose(kernels, &H100, shape, TRAINING, 0.375), Choice::Lists, "{shape:?}");
        }
    }
}

#[test]
fn cuda_a_choice_depends_on_its_arguments_alone() {
    for shape in shapes() {
        for share in [0.1, 0.5, 1.0] {
            let choice = |shape: &Shape| choose(ExpertKernels::Auto, &H100, shape, TRAINING, share);
            let all = Shape { tokens: shape.tokens.next_power_of_two(), ..shape };
            assert_eq!(choice(&shape), choice(&all), "{shape:?}");
            // Forced kernels are taken at any share.
            let forced = choose(ExpertKernels::Slots, &H100, &shape, TRAINING, share);
            assert!(matches!(forced, Choice::Slots(_)), "{shape:?}: {forced:?}");
            if let Choice::Slots(variants) = choice(&shape) {
                assert_eq!(forced, Choice::Slots(variants), "{shape:?}");
                assert!(Form::ALL.into_iter().all(|form| variants.of(form).takes(form)), "{variants:?}");
            }
        }
    }
}

/// The expected choice at a share.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Want {
    Dense,
    /// Tiles of 128 rows of pairs in all products.
    Tiles,
    /// Turned tiles in all products but the gradients of the weights.
    Turned,
    /// Others in some.
    Mixed,
}

fn kind(choice: Choice) -> Want {
    match choice {
        Choice::Dense => Want::Dense,
        Choice::Slots(Variants { up, project, down, input, .. }) => {
            let turned = [up, project, down, input].iter().filter(|variant| variant.turned).count();
            [Want::Tiles, Want::Mixed, Want::Mixed, Want::Mixed, Want::Turned][turned]
        }
        Choice::Lists => panic!("lists"),
    }
}

#[test]
fn cuda_the_choice_of_shapes_is_that_of_a_table() {
    use Want::{Dense, Mixed, Tiles, Turned};
    let large = Shape { hidden: 4096, width: 1376, ..shape(1) };
    let fine = Shape { hidden: 2048, width: 256, num_experts: 24, core: 2048, ..shape(1) };
    let tiny = Shape { hidden: 256, width: 96, core: 96, ..shape(1) };
    let shares = [0.1, 0.375, 0.6, 0.8, 0.95, 1.0];
    let table: [(Shape, Passes, usize, [Want; 6]); 12] = [
        (shape(1), Passes::Inference, 64, [Turned, Turned, Turned, Turned, Turned, Turned]),
        (shape(1), Passes::Inference, 1024, [Turned, Turned, Turned, Turned, Dense, Dense]),
        (shape(1), Passes::Inference, 8192, [Turned, Tiles, Tiles, Mixed, Dense, Dense]),
        // The gradients of the weights are bound by memory in both.
        (shape(1), TRAINING, 1024, [Turned, Turned, Turned, Turned, Turned, Tiles]),
        (shape(1), TRAINING, 8192, [Turned, Tiles, Tiles, Mixed, Dense, Dense]),
        (shape(1), ALL_PAIRS, 8192, [Turned, Tiles, Tiles, Mixed, Dense, Dense]),
        (large, Passes::Inference, 1024, [Mixed, Turned, Turned, Mixed, Dense, Dense]),
        (large, TRAINING, 8192, [Mixed, Mixed, Mixed, Mixed, Dense, Dense]),
        (fine, TRAINING, 1024, [Turned, Turned, Mixed, Mixed, Turned, Dense]),
        (fine, TRAINING, 8192, [Turned, Mixed, Tiles, Dense, Dense, Dense]),
        // Launches take longer than small products.
        (tiny, Passes::Inference, 1024, [Dense, Dense, Dense, Dense, Dense, Dense]),
        (tiny, TRAINING, 8192, [Turned, Dense, Dense, Dense, Dense, Dense]),
    ];
    let rows = table.map(|(shape, passes, tokens, want)| {
        let shape = Shape { tokens, ..shape };
        let got = shares.map(|share| kind(choose(ExpertKernels::Auto, &H100, &shape, passes, share)));
        (format!("{shape:?}, {passes:?}: {got:?}"), got == want)
    });
    assert!(rows.iter().all(|(_, same)| *same), "{rows:#?}");
}

#[test]
fn cuda_the_model_of_times_is_near_measurements_of_dense_products() {
    // Microseconds on an H100 with cuBLASLt: both projections, the activation and the down projection; the gradient of the
    // activation; of the input; of the weights.
    for (tokens, want) in [(8192, [1198.0, 365.0, 776.0, 1247.0]), (1024, [160.0, 48.0, 96.0, 278.0])] {
        let shape = shape(tokens);
        let one = dense_product(&H100, &shape);
        let [forward, _] =
            times(&H100, &shape, Passes::Inference, 1.0, &Variants::fastest(&H100, &shape, 1.0));
        let weights = 3.0 * one + memory(weight_bytes(&shape, Form::Weights));
        for (got, want) in [forward, one, 2.0 * one, weights].into_iter().zip(want) {
            let off: f64 = got / want - 1.0;
            assert!(off.abs() < 0.1, "{tokens} tokens: {got} and not {want}");
        }
    }
}

#[test]
fn cuda_the_model_of_times_predicts_products_as_published_with_it() {
    // Microseconds at 730 TFLOP/s with 0.3765 of the pairs of 8,192 tokens and 0.3704 of those of 1,024.
    let of_many = [
        (Form::Up, 303.0),
        (Form::Project, 154.0),
        (Form::Down, 157.0),
        (Form::Input, 303.0),
        (Form::Weights, 459.0),
    ];
    for (form, want) in of_many {
        let got = product(&H100, &shape(8192), 0.3765, (form, &Variant::DEFAULT));
        assert!((got - want).abs() < 3.0, "{form:?}: {got} and not {want}");
    }
    let forward: f64 = [Form::Up, Form::Down]
        .into_iter()
        .map(|form| product(&H100, &shape(1024), 0.3704, (form, &TURNED)))
        .sum();
    // That prediction is for the largest expert of its text, which has 16 tokens more per tile, and sums parts elsewhere.
    assert!((60.0..79.0).contains(&forward), "{forward}");
    // Gradients of the weights are bound by memory at few tokens.
    let weights = product(&H100, &shape(1024), 0.3704, (Form::Weights, &Variant::DEFAULT));
    assert!((weights - 145.0).abs() < 1.0, "{weights}");
}

#[test]
fn cuda_more_pairs_never_take_less_time_in_the_model() {
    for shape in shapes() {
        for form in Form::ALL {
            let mut before = 0.0;
            for share in 0..=20 {
                let time = product(&H100, &shape, f64::from(share) / 20.0, (form, &Variant::DEFAULT));
                assert!(
                    time.is_finite() && time >= before - 1e-9,
                    "{shape:?}, {form:?} at {share}: {time} after {before}"
                );
                before = time;
            }
        }
    }
}
