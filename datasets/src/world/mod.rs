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
mod land;
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
pub use land::{Domain, Probe, World};
pub use write::Written;

use land::{Purpose, Split};
use rng::Rng;

use crate::error::Result;
use crate::tasks::{Loaded, Options};

/// The default number of test items of a probe that are scored, where there are as many.
pub const ITEMS: usize = 400;

/// The items of one probe, all different.
#[derive(Clone, Debug)]
pub struct ProbeSet {
    /// To draw few-shot examples from.
    pub train: Vec<Item>,
    /// To be answered.
    pub test: Vec<Item>,
}

impl World {
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
}
