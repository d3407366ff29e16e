//! The embedded world: an invented land, text about it in four domains, and ten probes for models trained on that text.
//!
//! A seed determines all of it, in integer arithmetic, so that it is the same on every machine. The text contains facts
//! to remember (about people, towns and things, in varied phrasings) and skills to learn (sums, the output of programs,
//! references, copying). Each probe mirrors one of the ten benchmarks of the paper: its kind of question, its columns
//! and its scoring.
//!
//! **Held out.** Each question has a key: the subject and property of a fact, the wording and numbers of a word
//! problem, or the goal of a thing. A key belongs to the training split or to the test split. Test items have test
//! keys, and the text asks and answers with training keys only. The facts behind a test item appear in the text as
//! statements, so an item tests whether a model can use what it has read.
//!
//! ```
//! use dsmoe_datasets::world::{Domain, Probe, World};
//!
//! let world = World::new(0);
//! let stories: Vec<String> = world.text(Domain::Stories).take(1000).collect();
//! let probe = world.probe(Probe::Piqa, 200);
//! println!("{}\n{:?}", stories[0], probe.test[0]);
//! ```

mod frames;
mod item;
mod knowledge;
mod lore;
mod programs;
mod recall;
mod rng;
mod scripts;
mod social;
mod sums;
mod tales;
mod things;
mod write;

use std::collections::HashSet;

pub use item::{Item, TriviaAnswer};
pub use write::Written;

use lore::{Person, Town};
use rng::Rng;

use crate::error::Result;
use crate::tasks::{Loaded, Options, Task};

/// The default number of test items of a probe that are scored, where there are as many.
pub const ITEMS: usize = 400;

/// People that stories are about: the first of all.
const CAST: usize = 16;

/// A kind of text about the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// People, towns and things, and questions about them.
    Facts,
    /// Sums and word problems with worked answers.
    Math,
    /// Programs with their output.
    Code,
    /// Stories of what people do, feel and say.
    Stories,
}

impl Domain {
    /// All domains.
    pub const ALL: [Domain; 4] = [Domain::Facts, Domain::Math, Domain::Code, Domain::Stories];

    /// Returns the name, one word in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Domain::Facts => "facts",
            Domain::Math => "math",
            Domain::Code => "code",
            Domain::Stories => "stories",
        }
    }

    /// Returns its share of a corpus of all domains, in percent of the bytes.
    pub fn share(self) -> u64 {
        match self {
            Domain::Facts => 41,
            Domain::Math => 15,
            Domain::Code => 8,
            Domain::Stories => 36,
        }
    }
}

/// A probe task, called as the benchmark that it mirrors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Probe {
    /// The next step of an activity, of four endings.
    HellaSwag,
    /// The last word of a passage that said it before.
    Lambada,
    /// The thing that serves a goal, of two.
    Piqa,
    /// Asks what a person feels, does next or did before, of three answers.
    SocialIqa,
    /// The end of a story, of two.
    StoryCloze,
    /// Asks of which of two people a reason is true.
    WinoGrande,
    /// Word problems.
    Gsm8k,
    /// Questions about towns.
    NqOpen,
    /// Questions about people.
    TriviaQa,
    /// Questions that join two facts, or have several answers.
    WebQs,
}

impl Probe {
    /// All probes, in the order of the paper's benchmarks in this workspace.
    pub const ALL: [Probe; 10] = [
        Probe::HellaSwag,
        Probe::Lambada,
        Probe::Piqa,
        Probe::SocialIqa,
        Probe::StoryCloze,
        Probe::WinoGrande,
        Probe::Gsm8k,
        Probe::NqOpen,
        Probe::TriviaQa,
        Probe::WebQs,
    ];

    /// Returns the name of the benchmark, as in lm-evaluation-harness.
    pub fn name(self) -> &'static str {
        match self {
            Probe::HellaSwag => "hellaswag",
            Probe::Lambada => "lambada_openai",
            Probe::Piqa => "piqa",
            Probe::SocialIqa => "social_iqa",
            Probe::StoryCloze => "storycloze_2016",
            Probe::WinoGrande => "winogrande",
            Probe::Gsm8k => "gsm8k",
            Probe::NqOpen => "nq_open",
            Probe::TriviaQa => "triviaqa",
            Probe::WebQs => "webqs",
        }
    }

    /// Returns the benchmark.
    pub fn task(self) -> &'static Task {
        Task::named(self.name()).expect("a probe is named after a benchmark")
    }

    /// Choices of an item; none where the model has to find the words itself.
    pub fn choices(self) -> Option<usize> {
        match self {
            Probe::HellaSwag => Some(4),
            Probe::SocialIqa => Some(3),
            Probe::Piqa | Probe::StoryCloze | Probe::WinoGrande => Some(2),
            Probe::Lambada | Probe::Gsm8k | Probe::NqOpen | Probe::TriviaQa | Probe::WebQs => None,
        }
    }

    /// Returns the number of keys of which one belongs to the test split.
    fn test_share(self) -> u64 {
        match self {
            Probe::NqOpen | Probe::WebQs => 2,
            Probe::TriviaQa => 3,
            _ => 4,
        }
    }
}

/// The side on which something is asked: in the text, or by test items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    Train,
    Test,
}

/// The items of one probe, all different.
#[derive(Clone, Debug)]
pub struct ProbeSet {
    /// To draw few-shot examples from.
    pub train: Vec<Item>,
    /// To be answered.
    pub test: Vec<Item>,
}

/// The purposes of streams of random choices.
#[derive(Clone, Copy)]
enum Purpose {
    World,
    Text,
    Item,
    Split,
}

/// One world.
pub struct World {
    seed: u64,
    rivers: Vec<String>,
    towns: Vec<Town>,
    people: Vec<Person>,
}

impl World {
    /// Returns the world of `seed`.
    pub fn new(seed: u64) -> World {
        let (rivers, towns, people) = lore::settle(&mut Rng::new(seed, &[Purpose::World as u64]));
        World { seed, rivers, towns, people }
    }

    /// Returns all documents of `domain`: an endless stream, made on demand.
    pub fn text(&self, domain: Domain) -> impl Iterator<Item = String> {
        (0..).map(move |index| self.document(domain, index))
    }

    /// Writes document `index` of `domain`.
    pub fn document(&self, domain: Domain, index: u64) -> String {
        let rng = &mut Rng::new(self.seed, &[Purpose::Text as u64, domain as u64, index]);
        match domain {
            Domain::Facts => match rng.below(20) {
                0..5 => knowledge::person(self, rng),
                5..8 => knowledge::town(self, rng),
                8..12 => knowledge::gazette(self, rng),
                12..17 => knowledge::quiz(self, rng),
                17..19 => things::lesson(rng),
                _ => things::advice(self, rng),
            },
            Domain::Math => match rng.below(4) {
                0 => sums::table(rng),
                _ => sums::problems(self, rng),
            },
            Domain::Code => programs::program(rng),
            Domain::Stories => match rng.below(20) {
                0 => scripts::day(self, rng),
                1..4 => scripts::entry(self, rng),
                4..6 => social::episode(self, rng),
                6..8 => social::cases(self, rng),
                8..10 => tales::tale_of(self, rng),
                10..13 => recall::rhyme(self, rng),
                13..17 => recall::passage(self, rng),
                _ => frames::gossip(self, rng),
            },
        }
    }

    /// Writes documents of `domain` until they make up its [`Domain::share`] of `bytes` bytes of text.
    pub fn documents(&self, domain: Domain, bytes: u64) -> impl Iterator<Item = String> {
        let (want, mut have) = (bytes / 100 * domain.share(), 0);
        self.text(domain).take_while(move |text| {
            let wanted = have < want;
            have += text.len() as u64;
            wanted
        })
    }

    /// Loads `items` test items of `probe` as documents to ask a model, with examples where its benchmark shows some.
    /// Its name in results is `world_` and the name of the benchmark.
    ///
    /// # Errors
    /// A profile without that benchmark, or too few `items` to draw examples from.
    pub fn load(&self, probe: Probe, items: usize, options: &Options) -> Result<Loaded> {
        let set = self.probe(probe, items);
        let name = format!("world_{}", probe.name());
        let place = format!("world of seed {}", self.seed);
        let rows = |items: Vec<Item>| items.into_iter().map(|item| item.row());
        Loaded::from_rows(probe.task(), (&name, &place), rows(set.test), rows(set.train), options)
    }

    /// Makes `items` test items of `probe`, and as many training items, or fewer where the world has no more.
    pub fn probe(&self, probe: Probe, items: usize) -> ProbeSet {
        ProbeSet {
            train: self.items(probe, Split::Train, items),
            test: self.items(probe, Split::Test, items),
        }
    }

    fn items(&self, probe: Probe, split: Split, count: usize) -> Vec<Item> {
        let (mut items, mut seen) = (Vec::new(), HashSet::new());
        // A world with few keys repeats itself: the draws end when new items have become rare.
        for draw in 0..count.saturating_mul(20) as u64 {
            if items.len() == count {
                break;
            }
            let rng = &mut Rng::new(self.seed, &[Purpose::Item as u64, probe as u64, split as u64, draw]);
            let item = match probe {
                Probe::HellaSwag => scripts::item(self, rng, split),
                Probe::Lambada => recall::item(self, rng, split),
                Probe::Piqa => things::item(self, rng, split),
                Probe::SocialIqa => social::item(self, rng, split),
                Probe::StoryCloze => tales::item(self, rng, split),
                Probe::WinoGrande => frames::item(self, rng, split),
                Probe::Gsm8k => sums::item(self, rng, split),
                Probe::NqOpen | Probe::TriviaQa | Probe::WebQs => knowledge::item(self, rng, probe, split),
            };
            if seen.insert(item.clone()) {
                items.push(item);
            }
        }
        items
    }

    /// Returns the split that a key of `probe` belongs to.
    fn split(&self, probe: Probe, key: &[u64]) -> Split {
        let state = rng::hash(self.seed, &[Purpose::Split as u64, probe as u64]);
        match rng::hash(state, key).is_multiple_of(probe.test_share()) {
            true => Split::Test,
            false => Split::Train,
        }
    }

    /// Makes two different people for a story, among the well-known ones.
    fn cast(&self, rng: &mut Rng) -> [&Person; 2] {
        let one = rng.below(CAST);
        let two = (one + rng.between(1, CAST - 1)) % CAST;
        [&self.people[one], &self.people[two]]
    }
}
