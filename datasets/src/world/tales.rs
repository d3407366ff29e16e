//! Stories of five sentences whose end follows from one of them.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{fill, parts};
use super::rng::Rng;

/// Stories that turn out in one of two ways: an opening, the sentence that decides (luck, or bad luck), and the consequences
/// of the one and of the other.
const TALES: [&str; 14] = [
    "{a} wanted to sell pots at the market. | Many people came to buy that day. | Nobody came to buy that day. | \
     {a} went home with a full purse. | {a} carried all the pots home again.",
    "{a} planted beans in the spring. | All summer there was sun and rain. | All summer there was no rain. | \
     In autumn the barn was full of beans. | In autumn the barn was empty.",
    "{a} took part in the race at the fair. | {a} had trained hard for weeks. | {a} had a sore foot. | \
     {a} won the race. | {a} came in last.",
    "{a} baked a cake for {b}. | The cake came out of the oven in time. | The cake stayed too long in the oven. | \
     {b} ate the whole cake. | {b} would not eat the black cake.",
    "{a} went to the lake to catch fish. | The net was new and strong. | The net had a large hole. | \
     {a} came home with many fish. | {a} came home without a fish.",
    "{a} wrote a letter to {b}. | The rider had a fast horse. | The rider lost his bag. | \
     {b} read the letter on the same day. | {b} never saw the letter.",
    "{a} wanted to cross the river. | The bridge had just been mended. | The flood had broken the bridge. | \
     Soon {a} stood on the other side. | So {a} had to turn back.",
    "{a} lost a ring in the grass. | The sun made the ring shine. | The night was very dark. | \
     {a} found the ring at once. | {a} could not find the ring.",
    "{a} built a house for the hens. | The house had a strong door. | The house had no door. | \
     The fox went away hungry. | The fox took two of the hens.",
    "{a} sang a song at the fair. | {a} knew the song by heart. | {a} forgot half of the words. | \
     Everybody clapped. | Everybody laughed.",
    "{a} waited for the coach. | The coach came early. | A wheel of the coach broke. | By noon {a} was with {b}. | \
     By noon {a} was still waiting.",
    "{a} made a fire in the stove. | The wood was dry. | The wood was wet. | Soon the room was warm. | \
     The room stayed cold.",
    "{a} bought an old clock. | {b} knew how to mend clocks. | {b} dropped the clock. | \
     From then on the clock told the time. | The clock never went again.",
    "{a} climbed up to see the view. | The air was clear. | Thick fog came up. | \
     {a} could see all the way to the sea. | {a} could see nothing at all.",
];

/// Sentences that decide nothing.
const FILLERS: [&str; 12] = [
    "{b} was there too.",
    "It was a Sunday.",
    "{a} wore a red hat.",
    "A dog barked somewhere.",
    "{b} told a joke.",
    "{a} had slept well.",
    "Some geese flew by.",
    "{b} talked about the weather.",
    "{a} ate an apple.",
    "The bells rang.",
    "{a} thought of home.",
    "{b} whistled a tune.",
];

/// Makes the first four sentences, the right ending and the other. The key of the split is the tale, its turn and its
/// fillers.
fn draw(world: &World, rng: &mut Rng, split: Split) -> ([String; 4], String, String) {
    loop {
        let (tale, turn) = (rng.below(TALES.len()), rng.below(2));
        let (one, two) = (rng.below(FILLERS.len()), rng.below(FILLERS.len()));
        let key = [tale as u64, turn as u64, one as u64, two as u64];
        if one == two || world.split(Probe::StoryCloze, &key) != split {
            continue;
        }
        let [opening, luck, bad_luck, good, bad] = parts(TALES[tale]);
        let (turns, endings) = ([luck, bad_luck], [good, bad]);
        let [a, b] = world.cast(rng);
        let told = |pattern: &str| fill(pattern, &[("a", &a.name), ("b", &b.name)]);
        let mut middle = [FILLERS[one], FILLERS[two], turns[turn]];
        middle.swap(2, rng.below(3));
        let sentences = [opening, middle[0], middle[1], middle[2]].map(told);
        return (sentences, told(endings[turn]), told(endings[1 - turn]));
    }
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (sentences, right, wrong) = draw(world, rng, split);
    let [input_sentence_1, input_sentence_2, input_sentence_3, input_sentence_4] = sentences;
    let (endings, gold) = rng.mingle(right, vec![wrong]);
    let [sentence_quiz1, sentence_quiz2] = endings.try_into().expect("a right and a wrong ending");
    Item::StoryCloze {
        input_sentence_1,
        input_sentence_2,
        input_sentence_3,
        input_sentence_4,
        sentence_quiz1,
        sentence_quiz2,
        answer_right_ending: gold + 1,
    }
}

/// Makes a story.
pub(super) fn tale_of(world: &World, rng: &mut Rng) -> String {
    let (sentences, ending, _) = draw(world, rng, Split::Train);
    format!("{} {ending}", sentences.join(" "))
}
