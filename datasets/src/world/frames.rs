//! Sentences in which a reason tells which of two people is meant.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{OBJECTS, fill};
use super::rng::Rng;

/// Acts of `{a}` and `{b}` with `{o}`, and what is then true of `{a}` and of `{b}`.
const FRAMES: [(&str, [&str; 2]); 12] = [
    ("{a} gave the {o} to {b}", ["had no use for it", "had asked for it"]),
    ("{a} sold the {o} to {b}", ["needed the money", "offered a good price"]),
    ("{a} borrowed the {o} from {b}", ["had none", "had two of them"]),
    ("{a} carried the {o} for {b}", ["was strong", "was tired"]),
    ("{a} taught {b} to make a {o}", ["knew the craft", "wanted to learn"]),
    ("{a} hid the {o} from {b}", ["wanted to keep it", "often broke things"]),
    ("{a} paid {b} for the {o}", ["was the buyer", "was the seller"]),
    ("{a} lost the {o} to {b} in a game", ["played badly", "played well"]),
    ("{a} asked {b} about the {o}", ["knew nothing", "knew everything"]),
    ("{a} scolded {b} about the {o}", ["was angry", "had been careless"]),
    ("{a} thanked {b} for the {o}", ["got a present", "had been so kind"]),
    ("{a} took the {o} away from {b}", ["was greedy", "began to cry"]),
];

/// Makes a sentence with `_` in place of the person of whom its reason is true, and returns the two names, the right
/// one first. The key of the split is the frame and the object.
fn draw(world: &World, rng: &mut Rng, split: Split) -> (String, [String; 2]) {
    loop {
        let (frame, object, meant) = (rng.below(FRAMES.len()), rng.below(OBJECTS.len()), rng.below(2));
        if world.split(Probe::WinoGrande, &[frame as u64, object as u64]) != split {
            continue;
        }
        let (deed, reasons) = FRAMES[frame];
        let people = world.cast(rng);
        let [a, b] = people.map(|person| person.name.as_str());
        let deed = fill(deed, &[("a", a), ("b", b), ("o", OBJECTS[object])]);
        let names = [people[meant].name.clone(), people[1 - meant].name.clone()];
        return (format!("{deed} because _ {}.", reasons[meant]), names);
    }
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (sentence, [right, wrong]) = draw(world, rng, split);
    let (options, gold) = rng.mingle(right, vec![wrong]);
    let [option1, option2] = options.try_into().expect("a right and a wrong name");
    Item::WinoGrande { sentence, option1, option2, answer: (gold + 1).to_string() }
}

/// Makes two to four such sentences.
pub(super) fn gossip(world: &World, rng: &mut Rng) -> String {
    let told = (0..rng.between(2, 4)).map(|_| {
        let (sentence, [meant, _]) = draw(world, rng, Split::Train);
        sentence.replace('_', &meant)
    });
    told.collect::<Vec<_>>().join(" ")
}
