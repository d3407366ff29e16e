//! Sums, and problems in words that come down to sums.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::fill;
use super::rng::Rng;

const COUNTED: [&str; 10] =
    ["apples", "nuts", "eggs", "coins", "buttons", "candles", "stamps", "plums", "shells", "beads"];

/// The sums of a problem. Each after the first starts from the result before.
#[derive(Clone, Copy)]
enum Way {
    Add,
    Take,
    Multiply,
    AddThenTake,
}

const PROBLEMS: [(&str, Way); 8] = [
    ("{a} has {x} {t} and buys {y} more. How many has {a} now?", Way::Add),
    ("{a} has {x} {t} and {b} has {y}. How many do they have together?", Way::Add),
    ("{b} found {x} {t}. {a} found {y} more than {b}. How many did {a} find?", Way::Add),
    ("{a} had {x} {t} and gave {y} to {b}. How many are left?", Way::Take),
    ("There were {x} {t} on the table. {a} took {y} of them. How many are left?", Way::Take),
    ("{a} had {x} {t}, lost {y} and told {b}. How many are left?", Way::Take),
    ("{a} filled {x} bags with {y} {t} each. How many are there?", Way::Multiply),
    ("{a} had {x} {t}, found {y} more and gave {z} to {b}. How many are left?", Way::AddThenTake),
];

/// Makes a problem and its answer in the form of GSM8K. The key of the split is the problem and its first two numbers.
fn draw(world: &World, rng: &mut Rng, split: Split) -> (String, String) {
    loop {
        let problem = rng.below(PROBLEMS.len());
        let (pattern, way) = PROBLEMS[problem];
        let (x, y) = match way {
            Way::Add => (rng.between(2, 14), rng.between(2, 9)),
            Way::Take => {
                let x = rng.between(4, 18);
                (x, rng.between(2, (x - 1).min(9)))
            }
            Way::Multiply => (rng.between(2, 6), rng.between(2, 6)),
            Way::AddThenTake => (rng.between(3, 9), rng.between(2, 9)),
        };
        if world.split(Probe::Gsm8k, &[problem as u64, x as u64, y as u64]) != split {
            continue;
        }
        let z = rng.between(2, 9).min(x + y - 1);
        let (mut steps, mut result) = match way {
            Way::Add | Way::AddThenTake => sum(x, '+', y),
            Way::Take => sum(x, '-', y),
            Way::Multiply => sum(x, '*', y),
        };
        if let Way::AddThenTake = way {
            let (more, left) = sum(result, '-', z);
            (steps, result) = (format!("{steps}\n{more}"), left);
        }
        let [a, b] = world.cast(rng);
        let numbers = [x, y, z].map(|number| number.to_string());
        let slots = [
            ("a", a.name.as_str()),
            ("b", &b.name),
            ("t", rng.pick(&COUNTED)),
            ("x", &numbers[0]),
            ("y", &numbers[1]),
            ("z", &numbers[2]),
        ];
        return (fill(pattern, &slots), format!("{steps}\n#### {result}"));
    }
}

/// Writes `x + y = s`, and returns s too.
fn sum(x: usize, sign: char, y: usize) -> (String, usize) {
    let result = match sign {
        '+' => x + y,
        '-' => x - y,
        _ => x * y,
    };
    (format!("{x} {sign} {y} = {result}"), result)
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (question, answer) = draw(world, rng, split);
    Item::Gsm8k { question, answer }
}

/// Makes several problems with their answers.
pub(super) fn problems(world: &World, rng: &mut Rng) -> String {
    let solved = (0..rng.between(2, 6)).map(|_| {
        let (question, answer) = draw(world, rng, Split::Train);
        format!("Question: {question}\nAnswer: {answer}")
    });
    solved.collect::<Vec<_>>().join("\n\n")
}

/// Lines of sums without words.
pub(super) fn table(rng: &mut Rng) -> String {
    let sums = (0..rng.between(4, 8)).map(|_| {
        let (x, sign, y) = match rng.below(5) {
            0 | 1 => (rng.between(2, 14), '+', rng.between(2, 9)),
            2 | 3 => {
                let x = rng.between(3, 18);
                (x, '-', rng.between(2, (x - 1).min(9)))
            }
            _ => (rng.between(2, 6), '*', rng.between(2, 6)),
        };
        sum(x, sign, y).0
    });
    sums.collect::<Vec<_>>().join("\n")
}
