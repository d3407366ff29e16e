//! A seeded text about a small invented world: stories, facts, worked arithmetic, tiny programs with their output.
//!
//! The facts are consistent (a town has one river, a person one home) and the sums are right, so that a model has
//! something to learn beyond the frequency of words.

use crate::windows::mix;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;

/// What stands between two documents of [`synthetic_text`].
pub const DOC_SEPARATOR: &str = "<|endoftext|>";

const PLACES: usize = 24;
const PEOPLE: usize = 48;

const TRADES: [(&str, &str); 8] = [
    ("baker", "bread"),
    ("potter", "bowls"),
    ("weaver", "blankets"),
    ("fisher", "silver fish"),
    ("smith", "iron nails"),
    ("gardener", "pears"),
    ("miller", "flour"),
    ("carpenter", "small chairs"),
];
const ANIMALS: [&str; 8] = ["goat", "dog", "crow", "cat", "donkey", "hen", "fox", "hare"];
const COLOURS: [&str; 6] = ["red", "green", "white", "blue", "yellow", "grey"];
const LANDS: [&str; 6] = ["hill", "valley", "lake", "forest", "coast", "marsh"];
const WEATHER: [&str; 5] =
    ["the sun was shining", "it was raining", "snow had fallen", "a cold wind blew", "fog lay on the fields"];
const LOST: [&str; 8] = ["a key", "a lamp", "a ring", "a letter", "a coin", "a drum", "a map", "a bell"];
const SIZES: [&str; 5] = ["small", "large", "broken", "shining", "old"];
const THINGS: [&str; 10] =
    ["carts", "boats", "gates", "towers", "flags", "wheels", "stones", "trees", "barrels", "hats"];
const COUNTED: [&str; 6] = ["coins", "apples", "eggs", "candles", "buttons", "walnuts"];
const FEELINGS: [&str; 5] = ["happy", "tired", "proud", "worried", "curious"];

struct Place {
    name: String,
    land: &'static str,
    river: String,
    roofs: &'static str,
    goods: &'static str,
    founded: u64,
}

struct Person {
    name: String,
    home: usize,
    trade: (&'static str, &'static str),
    animal: &'static str,
    friend: usize,
}

struct Writer {
    rng: Pcg64,
    places: Vec<Place>,
    people: Vec<Person>,
}

/// At least `bytes` bytes of documents, with [`DOC_SEPARATOR`] on a line of its own after each. A function of its
/// arguments alone; a longer text of the same seed starts with the shorter one.
pub fn synthetic_text(seed: u64, bytes: usize) -> String {
    let mut writer = Writer::new(seed);
    let mut text = String::new();
    while text.len() < bytes {
        let document = match writer.below(20) {
            0..8 => writer.story(),
            8..13 => writer.place_facts(),
            13..15 => writer.person_facts(),
            15..18 => writer.arithmetic(),
            _ => writer.program(),
        };
        text.push_str(&document);
        text.push('\n');
        text.push_str(DOC_SEPARATOR);
        text.push('\n');
    }
    text
}

impl Writer {
    fn new(seed: u64) -> Writer {
        let rng = Pcg64::new(u128::from(mix(seed)), 1);
        let mut writer = Writer { rng, places: Vec::new(), people: Vec::new() };
        let mut names = Vec::new();
        for _ in 0..PLACES {
            let place = Place {
                name: writer.name(&mut names, &["ford", "stead", "wick", "mere"]),
                land: writer.pick(&LANDS),
                river: writer.name(&mut names, &["a", "en", "is"]),
                roofs: writer.pick(&COLOURS),
                goods: writer.pick(&TRADES).1,
                founded: 900 + writer.below(900),
            };
            writer.places.push(place);
        }
        for index in 0..PEOPLE {
            let person = Person {
                name: writer.name(&mut names, &["a", "o", "el", "in"]),
                home: writer.below(PLACES as u64) as usize,
                trade: writer.pick(&TRADES),
                animal: writer.pick(&ANIMALS),
                friend: (index + 1 + writer.below(PEOPLE as u64 - 1) as usize) % PEOPLE,
            };
            writer.people.push(person);
        }
        writer
    }

    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.rng.next_u64()) * u128::from(n)) >> 64) as u64
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// A name that is not among `taken` yet.
    fn name(&mut self, taken: &mut Vec<String>, endings: &[&str]) -> String {
        const ONSETS: [&str; 12] = ["B", "D", "Dr", "F", "K", "L", "M", "N", "R", "S", "T", "V"];
        const MIDDLES: [&str; 12] = ["al", "an", "ar", "el", "em", "ir", "ol", "on", "or", "ul", "un", "ost"];
        loop {
            let name = format!("{}{}{}", self.pick(&ONSETS), self.pick(&MIDDLES), self.pick(endings));
            if !taken.contains(&name) {
                taken.push(name.clone());
                return name;
            }
        }
    }

    fn story(&mut self) -> String {
        let (weather, lost, feeling) = (self.pick(&WEATHER), self.pick(&LOST), self.pick(&FEELINGS));
        let (count, ending, opening) = (2 + self.below(7), self.below(3), self.below(3));
        let who = self.below(PEOPLE as u64) as usize;
        let spot =
            self.pick(&["under the bridge", "behind the mill", "near the old well", "in the tall grass"]);
        let seen = (
            3 + self.below(17),
            self.pick(&SIZES),
            self.pick(&THINGS),
            self.pick(&COLOURS),
            self.pick(&THINGS),
        );
        let person = &self.people[who];
        let (friend, home) = (&self.people[person.friend], &self.places[person.home]);
        let (name, other, animal, town) = (&person.name, &friend.name, person.animal, &home.name);
        let mut text = match opening {
            0 => format!("One morning in {town} {weather}. {name} the {} woke up early.", person.trade.0),
            1 => format!("{name} was a {} in {town}. One day {weather}.", person.trade.0),
            _ => format!(
                "There was once a {} called {name}, who lived in {town}. It was a day when {weather}.",
                person.trade.0
            ),
        };
        text += &format!(
            " {name} had a {animal} and was {feeling}, for there was plenty of {} to sell.",
            person.trade.1
        );
        text += &format!(" {name} and the {animal} walked along the river {}.", home.river);
        text +=
            &format!(" On the way they saw {} {} {} and some {} {}.", seen.0, seen.1, seen.2, seen.3, seen.4);
        text += &format!(" There they met {other}, who said: \"I have lost {lost}. Will you help me?\"");
        text += match ending {
            0 => format!(" They looked {spot} for {count} hours. Then the {animal} found {lost}, and {other} was happy again."),
            1 => format!(" They looked {spot} until the evening, but they did not find {lost}. \"Do not worry,\" said {name}, \"we will look again tomorrow.\""),
            _ => format!(" \"It is {spot},\" said {name}. \"I saw it there {count} days ago.\" And so it was. {other} gave the {animal} something to eat."),
        }
        .as_str();
        text + &format!(" In the evening they all went home under the {} roofs of {town}.", home.roofs)
    }

    fn place_facts(&mut self) -> String {
        let index = self.below(PLACES as u64) as usize;
        let place = &self.places[index];
        let mut sentences = vec![
            format!("It was founded in the year {}.", place.founded),
            format!("The river {} runs through it.", place.river),
            format!("Its houses have {} roofs.", place.roofs),
            format!("It is known for its {}.", place.goods),
        ];
        if let Some(person) = self.people.iter().find(|person| person.home == index) {
            sentences.push(format!(
                "The best known person of {} is {}, a {}.",
                place.name, person.name, person.trade.0
            ));
        }
        let mut text = format!("{} is a town at the {}.", place.name, place.land);
        while !sentences.is_empty() {
            let next = self.below(sentences.len() as u64) as usize;
            text += " ";
            text += &sentences.swap_remove(next);
        }
        text
    }

    fn person_facts(&mut self) -> String {
        let (who, question) = (self.below(PEOPLE as u64) as usize, self.below(3));
        let person = &self.people[who];
        let (home, friend) = (&self.places[person.home], &self.people[person.friend]);
        let (name, trade) = (&person.name, person.trade.0);
        let text = format!("{name} is a {trade} from {} and has a {}.", home.name, person.animal);
        text + &match question {
            0 => format!(
                " Question: Who is the friend of {name}? Answer: {}, a {}.",
                friend.name, friend.trade.0
            ),
            1 => format!(
                " Question: Which river is near {name}? Answer: The {}, for it runs through {}.",
                home.river, home.name
            ),
            _ => format!(" Question: What does {name} make? Answer: A {trade} makes {}.", person.trade.1),
        }
    }

    fn arithmetic(&mut self) -> String {
        match self.below(3) {
            0 => {
                let (a, b) = (10 + self.below(90), 10 + self.below(90));
                let (ones, tens) = (a % 10 + b % 10, a / 10 + b / 10);
                let carry = ones / 10;
                let mut text = format!("What is {a} + {b}? {} + {} = {ones}.", a % 10, b % 10);
                text += &match carry {
                    0 => format!(" {} + {} = {tens}.", a / 10, b / 10),
                    _ => format!(" Carry 1. {} + {} + 1 = {}.", a / 10, b / 10, tens + 1),
                };
                text + &format!(" So {a} + {b} = {}.", a + b)
            }
            1 => {
                let (a, b) = (2 + self.below(8), 11 + self.below(39));
                let (tens, ones) = (b / 10 * 10, b % 10);
                let parts = format!("{a} x {tens} = {}. {a} x {ones} = {}.", a * tens, a * ones);
                format!(
                    "What is {a} x {b}? {parts} {} + {} = {}. So {a} x {b} = {}.",
                    a * tens,
                    a * ones,
                    a * b,
                    a * b
                )
            }
            _ => {
                let (giver, had, what) =
                    (self.below(PEOPLE as u64) as usize, 5 + self.below(40), self.pick(&COUNTED));
                let gave = 1 + self.below(had - 1);
                let person = &self.people[giver];
                let (name, friend) = (&person.name, &self.people[person.friend].name);
                let left = had - gave;
                let given = format!("{name} has {had} {what} and gives {gave} to {friend}.");
                format!("{given} How many are left? {had} - {gave} = {left}. {name} has {left} left.")
            }
        }
    }

    fn program(&mut self) -> String {
        let mut value = 1 + self.below(9);
        let variable = self.pick(&["x", "y", "n", "total"]);
        let mut text = format!("let {variable} = {value}\n");
        for _ in 0..1 + self.below(3) {
            let (by, times) = (1 + self.below(5), 2 + self.below(3));
            match self.below(4) {
                0 => {
                    text += &format!("{variable} = {variable} * {by}\n");
                    value *= by;
                }
                1 => {
                    text += &format!("if {variable} > 10: {variable} = {variable} - 10\n");
                    value -= if value > 10 { 10 } else { 0 };
                }
                2 => {
                    text += &format!("repeat {times}: {variable} = {variable} + {by}\n");
                    value += times * by;
                }
                _ => {
                    text += &format!("{variable} = {variable} + {by}\n");
                    value += by;
                }
            }
        }
        text + &format!("print {variable}\noutput: {value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_text_and_a_longer_one_continues_it() {
        let short = synthetic_text(3, 10_000);
        assert!((10_000..11_500).contains(&short.len()), "{}", short.len());
        assert!(synthetic_text(3, 50_000).starts_with(&short));
        assert_ne!(synthetic_text(4, 10_000), short);
    }

    #[test]
    fn every_sum_is_right() {
        let text = synthetic_text(1, 200_000);
        let mut checked = 0;
        let number = |word: &str| word.trim_end_matches('.').parse::<u64>().ok();
        let words: Vec<&str> = text.split_whitespace().collect();
        for at in 2..words.len() - 5 {
            let (Some(a), "+" | "-" | "x", Some(b), "=", Some(sum)) = (
                number(words[at]),
                words[at + 1],
                number(words[at + 2]),
                words[at + 3],
                number(words[at + 4]),
            ) else {
                continue;
            };
            let result = match (words[at - 1], words[at + 1]) {
                ("+", _) => number(words[at - 2]).unwrap() + a + b,
                (_, "+") => a + b,
                (_, "-") => a - b,
                _ => a * b,
            };
            assert_eq!(result, sum, "{:?}", &words[at - 2..at + 5]);
            checked += 1;
        }
        assert!(checked > 150, "{checked}");
    }

    #[test]
    fn documents_are_varied_and_hardly_repeat() {
        let text = synthetic_text(1, 300_000);
        let documents: Vec<&str> =
            text.split(DOC_SEPARATOR).map(str::trim).filter(|d| !d.is_empty()).collect();
        let distinct: std::collections::HashSet<&str> = documents.iter().copied().collect();
        assert!(distinct.len() * 10 > documents.len() * 8, "{} of {}", distinct.len(), documents.len());
        for kind in ["There was once", "is a town at", "Question:", "What is", "Carry 1", "output:"] {
            assert!(documents.iter().filter(|d| d.contains(kind)).count() > 20, "{kind}");
        }
    }
}
