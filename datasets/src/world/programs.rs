//! Small programs with their output.

use super::lore::{ANIMALS, COLOURS, OBJECTS};
use super::rng::Rng;

const VARIABLES: [&str; 6] = ["x", "y", "n", "k", "total", "count"];

/// Makes a program, and after it what it prints, each line behind `# `.
pub(super) fn program(rng: &mut Rng) -> String {
    match rng.below(6) {
        0 => assignments(rng),
        1 => counting(rng),
        2 => function(rng),
        3 => sequence(rng),
        4 => words(rng),
        _ => listing(rng),
    }
}

fn assignments(rng: &mut Rng) -> String {
    let variable = rng.pick(&VARIABLES);
    let mut value = rng.between(1, 20);
    let mut text = format!("{variable} = {value}\n");
    for _ in 0..rng.between(2, 4) {
        let by = rng.between(2, 9);
        match rng.below(4) {
            0 if value * by <= 99 => {
                text += &format!("{variable} = {variable} * {by}\n");
                value *= by;
            }
            1 => {
                text += &format!("if {variable} > 10:\n    {variable} = {variable} - 10\n");
                value -= if value > 10 { 10 } else { 0 };
            }
            _ => {
                text += &format!("{variable} = {variable} + {by}\n");
                value += by;
            }
        }
    }
    text + &format!("print({variable})\n# {value}")
}

fn counting(rng: &mut Rng) -> String {
    let variable = rng.pick(&VARIABLES);
    let (start, times, by) = (rng.between(0, 20), rng.between(2, 5), rng.between(1, 9));
    let (step, shown) = match rng.one_in(2) {
        true => {
            (format!("    {variable} = {variable} + {by}\nprint({variable})\n"), vec![start + times * by])
        }
        false => {
            let shown = (1..=times).map(|turn| start + turn * by).collect();
            (format!("    {variable} = {variable} + {by}\n    print({variable})\n"), shown)
        }
    };
    format!("{variable} = {start}\nfor i in range({times}):\n{step}{}", output(&shown))
}

fn function(rng: &mut Rng) -> String {
    let by = rng.between(2, 5);
    let (name, body) = match rng.below(4) {
        0 => ("add", "a + b".to_owned()),
        1 => ("larger", "a if a > b else b".to_owned()),
        2 => ("times", format!("{by} * a")),
        _ => ("mix", format!("{by} * a + b")),
    };
    let mut text = format!("def {name}(a, b):\n    return {body}\n\n");
    let mut shown = Vec::new();
    for _ in 0..rng.between(1, 3) {
        let (a, b) = (rng.between(1, 12), rng.between(1, 12));
        text += &format!("print({name}({a}, {b}))\n");
        shown.push(match name {
            "add" => a + b,
            "larger" => a.max(b),
            "times" => by * a,
            _ => by * a + b,
        });
    }
    text + &output(&shown)
}

fn sequence(rng: &mut Rng) -> String {
    let items: Vec<usize> = (0..rng.between(2, 5)).map(|_| rng.between(1, 20)).collect();
    let mut text = format!("items = {items:?}\n");
    let mut shown = Vec::new();
    for _ in 0..rng.between(1, 2) {
        let at = rng.below(items.len());
        let (asked, result) = match rng.below(5) {
            0 => ("len(items)".to_owned(), items.len()),
            1 => ("max(items)".to_owned(), items.iter().copied().fold(0, usize::max)),
            2 => ("min(items)".to_owned(), items.iter().copied().fold(usize::MAX, usize::min)),
            3 => ("items[-1]".to_owned(), items[items.len() - 1]),
            _ => (format!("items[{at}]"), items[at]),
        };
        text += &format!("print({asked})\n");
        shown.push(result);
    }
    text + &output(&shown)
}

fn words(rng: &mut Rng) -> String {
    let (colour, animal, object) = (rng.pick(&COLOURS), rng.pick(&ANIMALS), rng.pick(&OBJECTS));
    let (body, result) = match rng.below(4) {
        0 => ("one + \" \" + two", format!("{colour} {animal}")),
        1 => ("two + \" \" + three", format!("{animal} {object}")),
        2 => ("[three, one, two][1]", colour.to_owned()),
        _ => ("[three, one, two][0]", object.to_owned()),
    };
    format!("one = \"{colour}\"\ntwo = \"{animal}\"\nthree = \"{object}\"\nprint({body})\n# {result}")
}

/// Prints a list word by word, forwards or backwards.
fn listing(rng: &mut Rng) -> String {
    let mut words: Vec<&str> = (0..rng.between(2, 6)).map(|_| rng.pick(&OBJECTS)).collect();
    let mut text = format!("for word in {words:?}");
    if rng.one_in(4) {
        text += "[::-1]";
        words.reverse();
    }
    let shown = words.iter().map(|word| format!("# {word}")).collect::<Vec<_>>();
    format!("{text}:\n    print(word)\n{}", shown.join("\n"))
}

fn output(shown: &[usize]) -> String {
    shown.iter().map(|number| format!("# {number}")).collect::<Vec<_>>().join("\n")
}
