//! The towns, people and words of the world.

use super::rng::Rng;

const PEOPLE: usize = 32;
const TOWNS: usize = 16;
const RIVERS: usize = 8;

/// A trade and what it makes.
pub(super) const TRADES: [(&str, &str); 16] = [
    ("baker", "bread"),
    ("potter", "bowls"),
    ("weaver", "blankets"),
    ("fisher", "fish"),
    ("smith", "nails"),
    ("gardener", "pears"),
    ("miller", "flour"),
    ("carpenter", "chairs"),
    ("tailor", "coats"),
    ("cobbler", "shoes"),
    ("brewer", "beer"),
    ("beekeeper", "honey"),
    ("painter", "pictures"),
    ("glazier", "windows"),
    ("shepherd", "wool"),
    ("roper", "ropes"),
];
pub(super) const ANIMALS: [&str; 12] =
    ["goat", "dog", "crow", "cat", "donkey", "hen", "fox", "hare", "goose", "pony", "pig", "sheep"];
pub(super) const DISHES: [&str; 12] = [
    "soup",
    "cheese",
    "plums",
    "nuts",
    "porridge",
    "trout",
    "cake",
    "beans",
    "mushrooms",
    "cabbage",
    "eggs",
    "apples",
];
pub(super) const INSTRUMENTS: [&str; 10] =
    ["flute", "drum", "fiddle", "harp", "horn", "whistle", "lute", "trumpet", "bagpipe", "zither"];
pub(super) const LANDS: [&str; 8] = ["hill", "valley", "lake", "forest", "coast", "marsh", "moor", "canyon"];
pub(super) const COLOURS: [&str; 8] = ["red", "green", "white", "blue", "yellow", "grey", "black", "brown"];
pub(super) const TREES: [&str; 10] =
    ["oak", "ash", "elm", "birch", "lime", "willow", "maple", "pine", "beech", "larch"];
pub(super) const MONTHS: [&str; 8] =
    ["March", "April", "May", "June", "July", "August", "September", "October"];
/// Things that a person can carry about.
pub(super) const OBJECTS: [&str; 64] = [
    "lamp", "rope", "key", "ring", "letter", "coin", "map", "bell", "knife", "cup", "book", "hat", "belt",
    "comb", "mirror", "candle", "spoon", "hammer", "basket", "blanket", "brush", "button", "needle", "scarf",
    "pipe", "purse", "stick", "stone", "feather", "lock", "glove", "plate", "bottle", "bowl", "bucket",
    "chain", "coat", "drum", "fan", "flag", "flute", "fork", "horn", "jug", "kettle", "kite", "lantern",
    "mask", "nail", "net", "pan", "pen", "picture", "pillow", "pot", "ribbon", "saw", "shirt", "shoe",
    "shovel", "top", "vase", "whistle", "wreath",
];

pub(super) struct Town {
    pub(super) name: String,
    /// Index of [`World::rivers`](super::World).
    pub(super) river: usize,
    pub(super) land: &'static str,
    pub(super) goods: &'static str,
    pub(super) roofs: &'static str,
    pub(super) tree: &'static str,
    pub(super) month: &'static str,
}

pub(super) struct Person {
    pub(super) name: String,
    /// `she` or `he`.
    pub(super) pronoun: &'static str,
    /// Index of [`World::towns`](super::World).
    pub(super) home: usize,
    /// Index of [`TRADES`].
    pub(super) trade: usize,
    pub(super) animal: &'static str,
    /// Index of [`World::people`](super::World), not the person's own.
    pub(super) friend: usize,
    pub(super) dish: &'static str,
    pub(super) instrument: &'static str,
}

/// Makes rivers, towns and people, the popular ones first.
pub(super) fn settle(rng: &mut Rng) -> (Vec<String>, Vec<Town>, Vec<Person>) {
    let mut taken = Vec::new();
    let rivers: Vec<String> = (0..RIVERS).map(|_| name(rng, &mut taken, &["ane", "is", "ey"])).collect();
    let towns: Vec<Town> = (0..TOWNS)
        .map(|_| Town {
            name: name(rng, &mut taken, &["ford", "stead", "wick", "mere"]),
            river: rng.below(RIVERS),
            land: rng.pick(&LANDS),
            goods: rng.pick(&TRADES).1,
            roofs: rng.pick(&COLOURS),
            tree: rng.pick(&TREES),
            month: rng.pick(&MONTHS),
        })
        .collect();
    let people = (0..PEOPLE)
        .map(|index| {
            let (pronoun, endings) = rng.pick(&[("she", ["a", "el"]), ("he", ["o", "in"])]);
            Person {
                name: name(rng, &mut taken, &endings),
                pronoun,
                home: rng.below(TOWNS),
                trade: rng.below(TRADES.len()),
                animal: rng.pick(&ANIMALS),
                friend: (index + rng.between(1, PEOPLE - 1)) % PEOPLE,
                dish: rng.pick(&DISHES),
                instrument: rng.pick(&INSTRUMENTS),
            }
        })
        .collect();
    (rivers, towns, people)
}

/// Makes a name that is not among `taken` yet.
fn name(rng: &mut Rng, taken: &mut Vec<String>, endings: &[&str]) -> String {
    const ONSETS: [&str; 14] = ["B", "D", "Dr", "F", "G", "K", "L", "M", "N", "R", "S", "T", "V", "Y"];
    const MIDDLES: [&str; 12] = ["al", "an", "ar", "el", "em", "ir", "ol", "on", "or", "ul", "un", "ost"];
    loop {
        let name = format!("{}{}{}", rng.pick(&ONSETS), rng.pick(&MIDDLES), rng.pick(endings));
        if !taken.contains(&name) {
            taken.push(name.clone());
            return name;
        }
    }
}

/// Returns the parts of a row of a table of texts, which ` | ` separates.
pub(super) fn parts<const N: usize>(row: &'static str) -> [&'static str; N] {
    let mut parts = row.split(" | ");
    std::array::from_fn(|_| parts.next().expect("a row has all of its parts"))
}

/// Replaces every `{name}` in `template` by the value of that name.
pub(super) fn fill(template: &str, slots: &[(&str, &str)]) -> String {
    let mut parts = template.split('{');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once('}').expect("a slot is closed");
        let slot = slots.iter().find(|slot| slot.0 == name).expect("a slot has a value");
        text += slot.1;
        text += rest;
    }
    text
}

/// Capitalises the first letter of `text`.
pub(super) fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect()
}

/// Puts the indefinite article before `word`.
pub(super) fn a(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {word}")
}

/// Writes `a, b and c`.
pub(super) fn list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [word] => (*word).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
