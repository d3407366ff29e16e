//! The launches of the passes: what they read and write, and in which order.

use std::cell::RefCell;
use std::ops::Range;

use proptest::prelude::*;

use super::{DEFAULT, MOSTLY_TURNED};
use crate::Activation;
use crate::cuda::kernel::{Arg, Call};
use crate::cuda::ops::choice::{Choice, Device, ExpertKernels, Passes, Variants, choose};
use crate::cuda::ops::ffn;
use crate::cuda::ops::products::{self, Launch};
use crate::cuda::ops::slot_ffn::{BackwardTo, ForwardTo, Inputs, Layout, Planner, Step};
use crate::cuda::ops::slots::{Places, Shape};
use crate::cuda::ops::tests::compiled;
use crate::cuda::tensor_map::{TensorMap, Tiled};

const H100: Device = Device { capability: (9, 0), multiprocessors: 132, shared_memory: 232_448 };

/// A piece of memory, by name.
#[derive(Clone, Debug)]
struct Region {
    name: &'static str,
    bytes: Range<u64>,
}

/// The memory of a pass.
struct Memory {
    regions: Vec<Region>,
    places: Places,
    inputs: Inputs,
    forward: ForwardTo,
    backward: BackwardTo,
}

impl Memory {
    fn new(shape: &Shape, passes: Passes, set: bool) -> Memory {
        let Shape { tokens, hidden, num_experts: n, .. } = *shape;
        let mut regions = Vec::new();
        let mut next = 0x7000_0000_0000u64;
        let mut add = |name: &'static str, bytes: usize| {
            // Allocations start at multiples of 256 bytes, and nothing follows them at once.
            let start = next;
            next = (start + bytes as u64).next_multiple_of(256) + 4096;
            regions.push(Region { name, bytes: start..start + bytes as u64 });
            start
        };
        let weights = shape.intermediate() * hidden;
        let [x, dy] = [add("x", 2 * tokens * hidden), add("dy", 2 * tokens * hidden)];
        let gate = add("gate and up", 4 * weights);
        let down = add("down", 2 * weights);
        let [y, dx] = [add("y", 4 * tokens * hidden), add("dx", 4 * tokens * hidden)];
        let grads = ["dgate", "dup", "ddown"].map(|name| add(name, 4 * weights));
        let kept = ["a", "b"].map(|name| add(name, 2 * passes.kept(shape)));
        let [mask, active] = [add("mask", tokens * n), add("active", 4 * tokens)];
        let dcoefficients = add("dcoefficients", 4 * tokens * n);
        let groups = shape.groups();
        let places = Places {
            tokens: add("tokens of slots", 4 * shape.slots()),
            coefficients: add("coefficients of slots", 4 * shape.slots()),
            of_tokens: add("slots of tokens", 4 * tokens * groups),
            starts: add("starts", 4 * (groups + 1)),
            sizes: add("sizes", 4 * groups),
            tiles: add("tiles", 8 * shape.tiles()),
            pairs: add("pairs", 4),
            wide_tiles: add("wide tiles", 8 * shape.tiles()),
            wide_pairs: add("wide pairs", 4),
            counts: 0,
            order: 0,
            partials: 0,
        };
        let all = 2 * passes.workspace(shape);
        let workspace = add("workspace", all);
        regions.pop();
        let Layout { c, parts, da, db, g } = Layout::of(passes, shape);
        for (name, range) in [("c", c), ("parts", parts), ("da", da), ("db", db), ("g", g)] {
            let [start, end] = [range.start, range.end].map(|at| workspace + 2 * at as u64);
            assert!(
                start.is_multiple_of(128) && end <= workspace + all as u64,
                "{name} is {range:?} of {all} bytes"
            );
            regions.push(Region { name, bytes: start..end });
        }
        let inputs = Inputs { x, gate, up: gate + 2 * weights as u64, down, mask, active };
        let kept_if = (passes != Passes::Inference).then_some(kept);
        Memory {
            regions,
            places,
            inputs,
            forward: ForwardTo { y: Some(y), kept: kept_if, workspace },
            backward: BackwardTo { dx, grads, dcoefficients, workspace, dy, kept, set },
        }
    }

    /// Returns the region that has all of these bytes.
    ///
    /// # Panics
    /// There is none.
    fn of(&self, bytes: &Range<u64>, what: &str) -> &'static str {
        let mut found = self.regions.iter().filter(|region| {
            region.bytes.start <= bytes.start && bytes.end <= region.bytes.end && !region.bytes.is_empty()
        });
        let region = found.next().unwrap_or_else(|| panic!("{what}: {bytes:x?} is in no memory"));
        assert!(found.next().is_none(), "{what}: {bytes:x?} is in two pieces of memory");
        region.name
    }
}

/// Returns the bytes from the first to the last element of a matrix.
fn bytes_of(tiled: &Tiled) -> Range<u64> {
    let Tiled { base, size, sizes, strides, .. } = tiled;
    let rows: usize = strides.iter().zip(&sizes[1..]).map(|(stride, size)| stride * (size - 1)).sum();
    *base..base + (rows + sizes[0] * size) as u64
}

/// A step with the matrices that its descriptors describe.
type Described = (Step, Vec<Tiled>);

/// Returns the steps of both passes.
fn plan(memory: &Memory, planner: &Planner<'_>) -> [Vec<Described>; 2] {
    let all = RefCell::new(Vec::new());
    let encode = |tiled: &Tiled| {
        all.borrow_mut().push(tiled.clone());
        tiled.check()?;
        Ok(TensorMap([all.borrow().len() as u64; 16]))
    };
    let forward = planner.forward(&memory.forward, &encode).unwrap();
    let backward = match memory.forward.kept {
        Some(_) => planner.backward(&memory.backward, &encode).unwrap(),
        None => vec![],
    };
    let all = all.into_inner();
    // Numbers of descriptors say which are a step's.
    let with = |steps: Vec<Step>| {
        let maps = |step: &Step| match step {
            Step::Call(_) => vec![],
            Step::Product(launch) => {
                let used =
                    launch.maps.all().into_iter().map(|map| map.0[0] as usize).filter(|&number| number > 0);
                used.map(|number| all[number - 1].clone()).collect()
            }
        };
        steps.into_iter().map(|step| (step.clone(), maps(&step))).collect::<Vec<_>>()
    };
    [with(forward), with(backward)]
}

/// Returns a launch in words, without the text of its kernel.
fn shown(step: &Step) -> String {
    match step {
        Step::Call(Call { source, entry, defines, grid, args }) => {
            format!("{} {entry} {defines:?} {grid:?} {args:?}", source.name)
        }
        Step::Product(launch) => {
            let Launch { source, entry, defines, grid, maps, values } = &**launch;
            format!("{} {entry} {defines:?} {grid:?} {maps:?} {values:?}", source.name)
        }
    }
}

/// Checks a step: it reads what is set and writes other memory, which is set then.
fn check_step(memory: &Memory, set: &mut Vec<&'static str>, (step, described): &Described) {
    let at = |address: u64| address..address + 1;
    let (what, reads, writes): (_, Vec<Range<u64>>, Vec<Range<u64>>) = match step {
        Step::Call(Call { entry, args, .. }) => {
            let outs = match *entry {
                "backward_slots" => 4,
                "activate_slots" | "backward_inactive" | "clear_inactive" | "sum_slots" => 1,
                other => panic!("{other} is no part of a pass"),
            };
            let pointers: Vec<u64> = args
                .iter()
                .filter_map(|arg| match arg {
                    Arg::Ptr(at) => Some(*at),
                    _ => None,
                })
                .collect();
            // Arguments are where a piece of memory starts.
            for address in &pointers {
                let starts = memory.regions.iter().any(|region| region.bytes.start == *address);
                assert!(starts, "{entry}: {address:#x} is in the middle of memory");
            }
            let mut all = pointers.into_iter().map(at);
            let writes = all.by_ref().take(outs).collect();
            (*entry, all.collect(), writes)
        }
        Step::Product(launch) => {
            let Launch { entry, values, .. } = &**launch;
            let outs = match *entry {
                "weights" => described.len() - 3,
                "up" => described.len() - 1,
                _ => 1,
            };
            let (ins, outs) = described.split_at(described.len() - outs);
            let others = values.addresses().into_iter().filter(|&address| address != 0).map(at);
            (*entry, ins.iter().map(bytes_of).chain(others).collect(), outs.iter().map(bytes_of).collect())
        }
    };
    let reads: Vec<&str> = reads.iter().map(|bytes| memory.of(bytes, what)).collect();
    let writes: Vec<&'static str> = writes.iter().map(|bytes| memory.of(bytes, what)).collect();
    for name in &reads {
        assert!(set.contains(name), "{what} reads {name}, which is not set");
        assert!(!writes.contains(name), "{what} reads and writes {name}");
    }
    for name in writes {
        let written =
            ["y", "dx", "dgate", "dup", "ddown", "dcoefficients", "a", "b", "c", "parts", "da", "db", "g"];
        assert!(written.contains(&name), "{what} writes {name}");
        set.push(name);
    }
}

/// Checks the launches of both passes over a shape: their memory, their order and their kernels.
fn check_passes(shape: &Shape, passes: Passes, variants: &Variants, activation: Activation) {
    let memory = Memory::new(shape, passes, false);
    // Regions do not overlap.
    let mut sorted: Vec<_> = memory.regions.iter().map(|region| region.bytes.clone()).collect();
    sorted.sort_by_key(|bytes| (bytes.start, bytes.end));
    assert!(sorted.windows(2).all(|pair| pair[0].end <= pair[1].start), "{:x?}", memory.regions);
    let all_pairs = passes == Passes::Training { all_pairs: true };
    let planner = Planner {
        shape,
        slots: &memory.places,
        inputs: memory.inputs,
        variants,
        activation,
        all_pairs,
        multiprocessors: 132,
    };
    let [forward, backward] = plan(&memory, &planner);
    let lists =
        ["tokens of slots", "coefficients of slots", "slots of tokens", "starts", "sizes", "tiles", "pairs"];
    let mut set = vec!["x", "gate and up", "down", "mask", "active", "wide tiles", "wide pairs"];
    set.extend(lists);
    // Dense products of all pairs come before.
    set.extend(if all_pairs { &["a", "b"][..] } else { &[] });
    forward.iter().for_each(|step| check_step(&memory, &mut set, step));
    assert!(set.contains(&"y"), "{shape:?}");
    if passes != Passes::Inference {
        // Another layer's passes work in the same memory in between.
        set.retain(|name| !["c", "parts", "da", "db", "g"].contains(name));
        set.push("dy");
        set.extend(all_pairs.then_some("g"));
        backward.iter().for_each(|step| check_step(&memory, &mut set, step));
        for name in ["dx", "dgate", "dup", "ddown", "dcoefficients"] {
            assert!(set.contains(&name), "{name} of {shape:?}");
        }
    }
    // Without an output, the sums are left to the op that follows.
    let parts = ForwardTo { y: None, ..memory.forward };
    let less = planner.forward(&parts, &|_| Ok(TensorMap::NONE)).unwrap();
    let less: Vec<String> = less.iter().map(shown).collect();
    assert!(
        less.len() + 1 == forward.len() && !less.iter().any(|step| step.contains("sum_slots")),
        "{less:?}"
    );
    let all = |steps: [&[Described]; 2]| -> Vec<_> {
        steps.concat().iter().map(|(step, described)| (shown(step), format!("{described:?}"))).collect()
    };
    let [once_more, and_back] = plan(&memory, &planner);
    assert_eq!(all([&once_more, &and_back]), all([&forward, &backward]), "other launches for {shape:?}");
    for step in forward.iter().chain(&backward) {
        check_source(&step.0, variants, activation);
    }
}

/// Checks that a launch is one of those that a test compiles for Hopper.
fn check_source(step: &Step, variants: &Variants, activation: Activation) {
    match step {
        Step::Call(Call { source, entry, defines, .. }) => {
            assert!(std::ptr::eq(*source, &raw const ffn::SOURCE), "{entry} of {}", source.name);
            let activations = [Activation::Silu, Activation::GeluTanh];
            assert!(
                activations.iter().any(|&of| defines[..] == [ffn::define(of)]),
                "{entry} with {defines:?}"
            );
        }
        Step::Product(launch) => {
            let Launch { source, entry, defines, .. } = &**launch;
            let form = products::Form::ALL.into_iter().find(|form| form.entry() == *entry).unwrap();
            let variant = variants.of(form);
            let compiled = compiled::product_builds().into_iter().any(|(_, of, with)| {
                of == *variant
                    && (with == activation || form != products::Form::Up)
                    && of.defines(with)[..] == defines[..]
            });
            assert!(
                compiled && std::ptr::eq(*source, variant.source()),
                "{entry} with {defines:?} is not compiled"
            );
        }
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1..3000usize, 1..70usize, 1..40usize, 1..12usize, 0..60usize).prop_map(
        |(tokens, hidden, width, num_experts, core)| Shape {
            tokens,
            hidden: 8 * hidden,
            width: 8 * width,
            num_experts,
            core: 8 * core,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn cuda_passes_over_slots_read_what_is_set_and_stay_in_their_memory(
        shape in shapes(),
        share in 0.0..=1.0f64,
        gelu in any::<bool>(),
    ) {
        let activation = if gelu { Activation::GeluTanh } else { Activation::Silu };
        for passes in [
            Passes::Inference,
            Passes::Training { all_pairs: false },
            Passes::Training { all_pairs: true },
        ] {
            let Choice::Slots(chosen) = choose(ExpertKernels::Slots, &H100, &shape, passes, share) else {
                panic!("{shape:?} does not take the products");
            };
            for variants in [DEFAULT, MOSTLY_TURNED, chosen] {
                check_passes(&shape, passes, &variants, activation);
            }
        }
    }
}

#[test]
fn cuda_smaller_batches_fit_the_memory_of_larger_ones() {
    // The order of fields is that of `Shape::lens`; a batch of fewer tokens, or another FFN of a model, takes no more.
    let most = Shape { tokens: 500, hidden: 64, width: 72, num_experts: 6, core: 144 };
    for tokens in 1..=most.tokens {
        let less = Shape { tokens, num_experts: 4, core: 72, ..most };
        assert!(less.bytes() <= most.bytes(), "{less:?}");
        for passes in
            [Passes::Inference, Passes::Training { all_pairs: false }, Passes::Training { all_pairs: true }]
        {
            assert!(
                passes.workspace(&less) <= passes.workspace(&most)
                    && passes.kept(&less) <= passes.kept(&most)
            );
        }
    }
}
