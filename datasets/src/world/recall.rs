//! Passages whose last word was said before, among others like it.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{OBJECTS, fill};
use super::rng::Rng;

const PLACES: [&str; 8] = ["chest", "cupboard", "cellar", "barn", "box", "sack", "drawer", "attic"];

/// `{a}` and `{b}` are people, `{o}` and `{n}` objects, `{p}` and `{q}` places. Each passage ends in a slot and names
/// the object, which its key depends on; the last ones ask to remember for longer, or to tell more apart.
const PASSAGES: [&str; 12] = [
    "\"Is that your {o}, {b}?\" asks {a}. \"Yes, {a}",
    "{a} has a {o}. {b} wants the {o}",
    "{a} looks for the {o}. {b} has the {o}",
    "{a} wants a {o} from {b}. \"Take it,\" says {b}",
    "{a} bought a {o} from {b} at the market. {filler} At home everybody wanted to see the {o}",
    "{a} put the {o} into the {p}. {filler} Later {b} opened the {p} and took out the {o}",
    "{a} hid the {o} in the {p}. {filler} {b} looked for it everywhere and found it in the {p}",
    "{a} borrowed the {o} of {b}. {filler} After a week {a} brought the {o} back to {b}",
    "{a} came with a {o} and {b} came with a {n}. {filler} Then it began to rain and {a} dropped the {o}",
    "{a} came with a {n} and {b} came with a {o}. {filler} Then it began to rain and {b} dropped the {o}",
    "{a} put the {o} into the {p} and the {n} into the {q}. {filler} Later {b} opened the {p} and took out the {o}",
    "{a} put the {n} into the {q} and the {o} into the {p}. {filler} Later {b} opened the {p} and took out the {o}",
];

const FILLERS: [&str; 6] = [
    "",
    "It was a cold day.",
    "The sun went down behind the hill.",
    "Nobody said a word for a while.",
    "There was much to do that week.",
    "{b} went to see a friend.",
];

/// Makes a passage without its last stop. The key of the split is the passage and the object.
fn draw(world: &World, rng: &mut Rng, split: Split) -> String {
    loop {
        let (passage, object) = (rng.below(PASSAGES.len()), rng.below(OBJECTS.len()));
        if world.split(Probe::Lambada, &[passage as u64, object as u64]) != split {
            continue;
        }
        let object = OBJECTS[object];
        let other = rng.pick_where(&OBJECTS, |other| other != object);
        let place = rng.pick(&PLACES);
        let elsewhere = rng.pick_where(&PLACES, |other| other != place);
        let [a, b] = world.cast(rng);
        let filler = fill(rng.pick(&FILLERS), &[("b", &b.name)]);
        let slots = [
            ("a", a.name.as_str()),
            ("b", &b.name),
            ("o", object),
            ("n", other),
            ("p", place),
            ("q", elsewhere),
            ("filler", &filler),
        ];
        return fill(PASSAGES[passage], &slots).replace("  ", " ");
    }
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    Item::Lambada { text: draw(world, rng, split) }
}

/// Makes a passage.
pub(super) fn passage(world: &World, rng: &mut Rng) -> String {
    let passage = draw(world, rng, Split::Train);
    // An open quotation is closed.
    let end = if passage.matches('"').count() % 2 == 1 { "!\"" } else { "." };
    passage + end
}

/// Writes a counting rhyme that one person says and others repeat: only copying from the context helps.
pub(super) fn rhyme(world: &World, rng: &mut Rng) -> String {
    let [a, b] = world.cast(rng);
    let objects: Vec<&str> = (0..rng.between(3, 9)).map(|_| rng.pick(&OBJECTS)).collect();
    let told = rng.pick(&[
        "{a} sings: {s}. {b} sings: {s}. {a} and {b} sing: {s}.",
        "{a} says: {s}. Say it again! {s}.",
    ]);
    fill(told, &[("a", &a.name), ("b", &b.name), ("s", &objects.join(" "))])
}
