//! Events, and the feelings and acts that they lead to.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{capital, fill, parts};
use super::rng::Rng;

/// Something that can happen to `{a}`.
struct Event {
    /// Two ways to say it.
    happens: [&'static str; 2],
    feels: &'static str,
    /// The reaction of `{a}`.
    next: &'static str,
    /// The act of `{a}` that made it possible.
    before: &'static str,
}

/// Each in two ways.
const QUESTIONS: [[&str; 2]; 3] = [
    ["How does {a} feel?", "How would you describe {a}?"],
    ["What will {a} do next?", "What does {a} want to do now?"],
    ["What did {a} do before?", "What did {a} do first?"],
];

/// Lists two wordings, the feeling, the reaction and the preceding act of each event.
const EVENTS: [&str; 18] = [
    "{a} lost the key | the key of {a} was gone | worried | look under the mat | lock the door",
    "{a} won the race | nobody ran as fast as {a} | proud | show the medal | run every morning",
    "{a} broke the big jug | {a} let the big jug fall | sorry | sweep the floor | carry the jug",
    "it rained on {a} all day | {a} got wet in the rain | tired | dry the clothes | leave the house",
    "{a} had no food all day | {a} ate nothing | hungry | cook some soup | leave the bread at home",
    "{a} saw a wolf | a wolf came close to {a} | afraid | bar the gate | look out of the window",
    "{a} got a present | somebody gave {a} a present | glad | untie the string | invite the family",
    "a bee stung {a} | {a} was stung by a bee | hurt | put ice on the arm | smell a flower",
    "{a} heard a strange noise | a noise woke {a} | afraid | light a lamp | lie in bed",
    "{a} finished the chair | the chair of {a} was ready | proud | sit down | saw the wood",
    "{a} missed the coach | the coach left without {a} | angry | walk home | stay too long",
    "{a} found a purse | there lay a purse before {a} | glad | ask who lost it | go for a walk",
    "{a} shouted at a friend | a friend wept about {a} | sorry | ask to be forgiven | start a quarrel",
    "{a} worked in the field | the work made {a} sweat | tired | go to bed | get up at dawn",
    "a thief robbed {a} | {a} was robbed by a thief | angry | call the guard | carry much money",
    "{a} cut a finger | the knife hit {a} | hurt | fetch a bandage | slice the ham",
    "the dog of {a} fell ill | {a} has a sick dog | worried | fetch the doctor | stroke the dog",
    "{a} smelled the fresh bread | the bread was in front of {a} | hungry | buy a loaf | pass the bakery",
];

/// Returns event `index`.
fn event(index: usize) -> Event {
    let [one, other, feels, next, before] = parts(EVENTS[index]);
    Event { happens: [one, other], feels, next, before }
}

impl Event {
    fn answer(&self, asked: usize) -> &'static str {
        [self.feels, self.next, self.before][asked]
    }
}

/// A case: what happened, what is asked, the right answer, and two wrong ones.
struct Case {
    context: String,
    question: String,
    right: &'static str,
    wrong: [&'static str; 2],
}

/// Makes a case whose event and question, both in their wording, belong to `split`. Half of the time something else
/// happens to a second person; what would be right of that person is a wrong answer.
fn draw(world: &World, rng: &mut Rng, split: Split) -> Case {
    let (first, asked, said, put) = loop {
        let (index, asked, said, put) =
            (rng.popular(EVENTS.len()), rng.below(QUESTIONS.len()), rng.below(2), rng.below(2));
        if world.split(Probe::SocialIqa, &[index, asked, said, put].map(|part| part as u64)) == split {
            break (event(index), asked, said, put);
        }
    };
    let right = first.answer(asked);
    let other = |rng: &mut Rng, taken: &[&str]| loop {
        let other = event(rng.popular(EVENTS.len()));
        if !taken.contains(&other.answer(asked)) {
            break other;
        }
    };
    let second = other(rng, &[right]);
    let wrong = [second.answer(asked), other(rng, &[right, second.answer(asked)]).answer(asked)];
    let [one, two] = world.cast(rng);
    let happens = fill(first.happens[said], &[("a", &one.name)]);
    let also = fill(rng.pick(&second.happens), &[("a", &two.name)]);
    let context = match rng.below(4) {
        0 => format!("{happens}, and {also}."),
        1 => format!("{also}, and {happens}."),
        _ => format!("{happens}."),
    };
    Case {
        context: capital(&context),
        question: fill(QUESTIONS[asked][put], &[("a", &one.name)]),
        right,
        wrong,
    }
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let case = draw(world, rng, split);
    let (answers, gold) = rng.mingle(case.right.to_owned(), case.wrong.map(str::to_owned).to_vec());
    let [answer_a, answer_b, answer_c] = answers.try_into().expect("one right and two wrong answers");
    let label = (gold + 1).to_string();
    Item::SocialIqa { context: case.context, question: case.question, answer_a, answer_b, answer_c, label }
}

/// Makes several cases with their answers.
pub(super) fn cases(world: &World, rng: &mut Rng) -> String {
    let asked = (0..rng.between(2, 4)).map(|_| {
        let case = draw(world, rng, Split::Train);
        format!("Q: {} {}\nA: {}", case.context, case.question, case.right)
    });
    asked.collect::<Vec<_>>().join("\n\n")
}

/// Makes a text about one or two people: what they did, what happened, what they felt and did next.
pub(super) fn episode(world: &World, rng: &mut Rng) -> String {
    let cast = world.cast(rng);
    let count = rng.between(1, 2);
    let told = cast.iter().take(count).map(|person| (person, event(rng.popular(EVENTS.len()))));
    let told: Vec<_> = told.collect();
    let mut sentences = Vec::new();
    for pattern in [
        rng.pick(&["{a} decided to {before}.", "One day {a} had to {before}."]),
        rng.pick(&["Then {happens}.", "Later {happens}."]),
        rng.pick(&["{a} was {feels}.", "So {a} felt {feels}."]),
        rng.pick(&["{a} wanted to {next}.", "In the end {a} had to {next}."]),
    ] {
        for (person, event) in &told {
            let happens = fill(rng.pick(&event.happens), &[("a", &person.name)]);
            let slots = [
                ("a", person.name.as_str()),
                ("before", event.before),
                ("happens", &happens),
                ("feels", event.feels),
                ("next", event.next),
            ];
            sentences.push(fill(pattern, &slots));
        }
    }
    sentences.join(" ")
}
