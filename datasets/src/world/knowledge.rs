//! Facts about people and towns: portraits that state them in many ways, and three kinds of questions about them.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{ANIMALS, TRADES, capital, fill, list, parts};
use super::rng::Rng;

/// Something known of every person, or of every town.
struct Relation {
    /// `{s}` is the subject; a sentence that starts with it can start with a pronoun. `{v}` is the value.
    statements: [&'static str; 4],
    /// Without the question mark.
    questions: [&'static str; 3],
}

/// Returns a relation from its statements and questions.
fn relation(row: &'static str) -> Relation {
    let [a, b, c, d, questions @ ..] = parts::<7>(row);
    Relation { statements: [a, b, c, d], questions }
}

/// The relations of people.
const PERSON: [&str; 6] = [
    "{s} lives in {v}. | The home of {s} is {v}. | {s} has a house in {v}. | In {v} there lives {s}. | \
     Where does {s} live | In which town does {s} live | Where is the home of {s}",
    "{s} is a {v}. | {s} works as a {v}. | The work of {s} is that of a {v}. | People know {s} as a good {v}. | \
     What is the trade of {s} | What work does {s} do | As what does {s} work",
    "{s} keeps a {v}. | The animal of {s} is a {v}. | {s} has a {v} at home. | A {v} belongs to {s}. | \
     Which animal does {s} keep | What is the animal of {s} | Which animal belongs to {s}",
    "{s} is a friend of {v}. | The best friend of {s} is {v}. | {s} often visits {v}, a friend. | \
     A good friend to {s} is {v}. | Who is the friend of {s} | Whom does {s} visit | Who is a good friend to {s}",
    "{s} likes to eat {v}. | The favourite food of {s} is {v}. | {s} eats {v} every day. | \
     Nothing tastes better to {s} than {v}. | What does {s} like to eat | What is the favourite food of {s} | \
     What does {s} eat every day",
    "{s} plays the {v}. | The instrument of {s} is the {v}. | {s} has learned to play the {v}. | \
     At every fair you hear {s} on the {v}. | What does {s} play | What is the instrument of {s} | \
     Which instrument does {s} play",
];

/// The relations of towns.
const TOWN: [&str; 6] = [
    "The river {v} runs through {s}. | {s} lies on the river {v}. | The water in {s} comes from the {v}. | \
     A bridge in {s} crosses the {v}. | which river runs through {s} | on which river does {s} lie | \
     what is the river of {s}",
    "{s} is a town at the {v}. | The town of {s} was built near a {v}. | {s} stands close to the {v}. | \
     From {s} you can see the {v}. | what is {s} close to | near what was {s} built | what can you see from {s}",
    "{s} is known for its {v}. | For the best {v} you go to {s}. | {s} sells {v} to all the land. | \
     People go to {s} to buy {v}. | what is {s} known for | what does {s} sell | what do people buy in {s}",
    "The roofs of {s} are {v}. | {s} has {v} roofs. | All houses in {s} are {v} on top. | \
     You know {s} by its {v} roofs. | which colour are the roofs of {s} | what colour has {s} on its roofs | \
     how do the roofs of {s} look",
    "An old {v} stands in the middle of {s}. | {s} has the {v} in its coat of arms. | The tree of {s} is the {v}. | \
     In {s} they meet under the {v}. | what is the tree of {s} | under which tree do they meet in {s} | \
     which tree stands in {s}",
    "The fair of {s} is in {v}. | {s} holds its fair in {v}. | Every {v} there is a fair in {s}. | \
     In {v} all go to the fair of {s}. | when is the fair of {s} | in which month is the fair of {s} | \
     when does {s} hold its fair",
];

/// Questions that follow from two facts or have several answers: a statement, and three wordings of the question.
const DERIVED: [&str; 6] = [
    "{s} sells {v}. | What does {s} sell? | What can you buy from {s}? | What does {s} make for a living?",
    "The house of {s} stands near the river {v}. | Which river is near {s}? | On which river does {s} live? | \
     Which river does {s} see from home?",
    "In {s} you can meet {v}. | Who lives in {s}? | Who is at home in {s}? | Whom can you meet in {s}?",
    "On the {s} there are {v}. | What lies on the {s}? | Where does the {s} flow? | What does the {s} pass?",
    "The trade of {v} is that of a {s}. | Who is a {s}? | Who works as a {s}? | Who is known as a good {s}?",
    "You can see a {s} with {v}. | Who keeps a {s}? | Who has a {s}? | Whose animal is a {s}?",
];

/// Returns the statement and the wordings of a derived question.
fn derived(kind: usize) -> (&'static str, [&'static str; 3]) {
    let [statement, questions @ ..] = parts::<4>(DERIVED[kind]);
    (statement, questions)
}

impl World {
    fn of_person(&self, relation: usize, index: usize) -> &str {
        let person = &self.people[index];
        match relation {
            0 => &self.towns[person.home].name,
            1 => TRADES[person.trade].0,
            2 => person.animal,
            3 => &self.people[person.friend].name,
            4 => person.dish,
            _ => person.instrument,
        }
    }

    fn of_town(&self, relation: usize, index: usize) -> &str {
        let town = &self.towns[index];
        match relation {
            0 => &self.rivers[town.river],
            1 => town.land,
            2 => town.goods,
            3 => town.roofs,
            4 => town.tree,
            _ => town.month,
        }
    }

    /// Returns the subject of a derived question, and all right answers; there may be none.
    fn derived(&self, kind: usize, index: usize) -> (&str, Vec<&str>) {
        let people = |fits: &dyn Fn(&super::lore::Person) -> bool| {
            self.people.iter().filter(|person| fits(person)).map(|person| person.name.as_str()).collect()
        };
        match kind {
            0 => (&self.people[index].name, vec![TRADES[self.people[index].trade].1]),
            1 => {
                let river = self.towns[self.people[index].home].river;
                (&self.people[index].name, vec![&self.rivers[river]])
            }
            2 => (&self.towns[index].name, people(&|person| person.home == index)),
            3 => {
                let towns = self.towns.iter().filter(|town| town.river == index);
                (&self.rivers[index], towns.map(|town| town.name.as_str()).collect())
            }
            4 => (TRADES[index].0, people(&|person| person.trade == index)),
            _ => (ANIMALS[index], people(&|person| person.animal == ANIMALS[index])),
        }
    }

    /// Makes a random derived question that has an answer.
    fn draw_derived(&self, rng: &mut Rng) -> (usize, usize) {
        loop {
            let kind = rng.pick(&[0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5]);
            let index = match kind {
                0 | 1 => rng.popular(self.people.len()),
                2 => rng.popular(self.towns.len()),
                3 => rng.below(self.rivers.len()),
                4 => rng.below(TRADES.len()),
                _ => rng.below(ANIMALS.len()),
            };
            if !self.derived(kind, index).1.is_empty() {
                return (kind, index);
            }
        }
    }
}

/// Makes a question and its answers, the usual one first. The key of the split is who and what is asked, not how.
fn question(world: &World, rng: &mut Rng, probe: Probe, split: Split) -> (String, Vec<String>) {
    loop {
        let (kind, index) = match probe {
            Probe::TriviaQa => (rng.below(PERSON.len()), rng.popular(world.people.len())),
            Probe::NqOpen => (rng.below(TOWN.len()), rng.popular(world.towns.len())),
            _ => world.draw_derived(rng),
        };
        if world.split(probe, &[kind as u64, index as u64]) != split {
            continue;
        }
        let (pattern, subject, answers) = match probe {
            Probe::TriviaQa => {
                let name = world.people[index].name.as_str();
                (rng.pick(&relation(PERSON[kind]).questions), name, vec![world.of_person(kind, index)])
            }
            Probe::NqOpen => {
                let name = world.towns[index].name.as_str();
                (rng.pick(&relation(TOWN[kind]).questions), name, vec![world.of_town(kind, index)])
            }
            _ => {
                let (subject, answers) = world.derived(kind, index);
                (rng.pick(&derived(kind).1), subject, answers)
            }
        };
        return (fill(pattern, &[("s", subject)]), answers.into_iter().map(str::to_owned).collect());
    }
}

/// Makes an item of one of the three probes of knowledge.
pub(super) fn item(world: &World, rng: &mut Rng, probe: Probe, split: Split) -> Item {
    let (question, answers) = question(world, rng, probe, split);
    match probe {
        Probe::TriviaQa => Item::trivia_qa(question, answers),
        Probe::NqOpen => Item::NqOpen { question, answer: answers },
        _ => Item::WebQs { question, answers },
    }
}

/// Makes several questions with their answers.
pub(super) fn quiz(world: &World, rng: &mut Rng) -> String {
    let probe = rng.pick(&[Probe::TriviaQa, Probe::TriviaQa, Probe::NqOpen, Probe::WebQs]);
    let count = rng.between(2, 6);
    let asked = (0..count).map(|_| {
        let (question, answers) = question(world, rng, probe, Split::Train);
        let answer = rng.pick(&answers.iter().map(String::as_str).collect::<Vec<_>>()).to_owned();
        match probe {
            Probe::TriviaQa => format!("Question: {question}?\nAnswer: {answer}"),
            Probe::NqOpen => format!("Q: {question}?\nA: {answer}"),
            _ => format!("Question: {question}\nAnswer: {answer}"),
        }
    });
    let asked: Vec<String> = asked.collect();
    match probe {
        Probe::NqOpen => format!("Answer these questions:\n\n{}", asked.join("\n")),
        _ => asked.join("\n\n"),
    }
}

/// Makes a few sentences about a subject that is called by its name or by a pronoun. `of` draws a statement of a kind, and
/// returns its value too.
fn portrait<'a>(
    rng: &mut Rng,
    kinds: usize,
    [name, pronoun]: [&str; 2],
    of: impl Fn(&mut Rng, usize) -> (&'static str, &'a str),
) -> String {
    let mut kinds: Vec<usize> = (0..kinds).collect();
    rng.shuffle(&mut kinds);
    let count = rng.between(3, 5);
    let mut sentences = Vec::new();
    for &kind in &kinds[..count] {
        let (pattern, value) = of(rng, kind);
        let again = !sentences.is_empty() && pattern.starts_with("{s}") && rng.one_in(3);
        sentences.push(fill(pattern, &[("s", if again { pronoun } else { name }), ("v", value)]));
    }
    sentences.join(" ")
}

/// Makes a few sentences about one person.
pub(super) fn person(world: &World, rng: &mut Rng) -> String {
    let index = rng.popular(world.people.len());
    let person = &world.people[index];
    let names = [person.name.as_str(), &capital(person.pronoun)];
    portrait(rng, PERSON.len() + 2, names, |rng, kind| match kind.checked_sub(PERSON.len()) {
        None => (rng.pick(&relation(PERSON[kind]).statements), world.of_person(kind, index)),
        Some(kind) => (derived(kind).0, world.derived(kind, index).1[0]),
    })
}

/// Makes a few sentences about one town.
pub(super) fn town(world: &World, rng: &mut Rng) -> String {
    let index = rng.popular(world.towns.len());
    portrait(rng, TOWN.len(), [world.towns[index].name.as_str(), "It"], |rng, kind| {
        (rng.pick(&relation(TOWN[kind]).statements), world.of_town(kind, index))
    })
}

/// Makes a text of what several people or towns have in common, and of single facts about various subjects.
pub(super) fn gazette(world: &World, rng: &mut Rng) -> String {
    let mut sentences = Vec::new();
    for _ in 0..rng.between(2, 4) {
        let sentence = match rng.below(3) {
            0 => {
                let (kind, index) = (rng.below(PERSON.len()), rng.popular(world.people.len()));
                let subject = world.people[index].name.as_str();
                let pattern = rng.pick(&relation(PERSON[kind]).statements);
                fill(pattern, &[("s", subject), ("v", world.of_person(kind, index))])
            }
            1 => {
                let (kind, index) = (rng.below(TOWN.len()), rng.popular(world.towns.len()));
                let subject = world.towns[index].name.as_str();
                let pattern = rng.pick(&relation(TOWN[kind]).statements);
                fill(pattern, &[("s", subject), ("v", world.of_town(kind, index))])
            }
            _ => {
                let (kind, index) = world.draw_derived(rng);
                let (subject, mut answers) = world.derived(kind, index);
                rng.shuffle(&mut answers);
                answers.truncate(3);
                fill(derived(kind).0, &[("s", subject), ("v", &list(&answers))])
            }
        };
        sentences.push(sentence);
    }
    sentences.join(" ")
}
