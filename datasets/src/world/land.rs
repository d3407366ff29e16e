//! A world: its facts, the kinds of text and probes about it, and which side asks what.

use super::lore::{self, Person, Town};
use super::rng::{self, Rng};
use crate::tasks::Task;

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
        ["facts", "math", "code", "stories"][self as usize]
    }

    /// Returns its share of a corpus of all domains, in percent of the bytes.
    pub fn share(self) -> u64 {
        [41, 15, 8, 36][self as usize]
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

    /// Returns the name of the benchmark, the choices of an item, and the number of keys of which one belongs to the test
    /// split.
    fn traits(self) -> (&'static str, Option<usize>, u64) {
        match self {
            Probe::HellaSwag => ("hellaswag", Some(4), 4),
            Probe::Lambada => ("lambada_openai", None, 4),
            Probe::Piqa => ("piqa", Some(2), 4),
            Probe::SocialIqa => ("social_iqa", Some(3), 4),
            Probe::StoryCloze => ("storycloze_2016", Some(2), 4),
            Probe::WinoGrande => ("winogrande", Some(2), 4),
            Probe::Gsm8k => ("gsm8k", None, 4),
            Probe::NqOpen => ("nq_open", None, 2),
            Probe::TriviaQa => ("triviaqa", None, 3),
            Probe::WebQs => ("webqs", None, 2),
        }
    }

    /// Returns the name of the benchmark, as in lm-evaluation-harness.
    pub fn name(self) -> &'static str {
        self.traits().0
    }

    /// Returns the benchmark.
    pub fn task(self) -> &'static Task {
        Task::named(self.name()).expect("a probe is named after a benchmark")
    }

    /// Choices of an item; none where the model has to find the words itself.
    pub fn choices(self) -> Option<usize> {
        self.traits().1
    }
}

/// The side on which something is asked: in the text, or by test items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    Train,
    Test,
}

/// The purposes of streams of random choices.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    World,
    Text,
    Item,
    Split,
}

/// One world.
pub struct World {
    pub(super) seed: u64,
    pub(super) rivers: Vec<String>,
    pub(super) towns: Vec<Town>,
    pub(super) people: Vec<Person>,
}

impl World {
    /// Returns the world of `seed`.
    pub fn new(seed: u64) -> World {
        let (rivers, towns, people) = lore::settle(&mut Rng::new(seed, &[Purpose::World as u64]));
        World { seed, rivers, towns, people }
    }

    /// Returns the split that a key of `probe` belongs to.
    pub(super) fn split(&self, probe: Probe, key: &[u64]) -> Split {
        let state = rng::hash(self.seed, &[Purpose::Split as u64, probe as u64]);
        match rng::hash(state, key).is_multiple_of(probe.traits().2) {
            true => Split::Test,
            false => Split::Train,
        }
    }

    /// Makes two different people for a story, among the well-known ones.
    pub(super) fn cast(&self, rng: &mut Rng) -> [&Person; 2] {
        let one = rng.below(CAST);
        let two = (one + rng.between(1, CAST - 1)) % CAST;
        [&self.people[one], &self.people[two]]
    }
}
