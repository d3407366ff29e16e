//! Uses of things: properties of things, needs of goals, and the choice of a thing for a goal.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{a, capital, fill, parts};
use super::rng::Rng;

/// Something that some things can do and some goals need.
struct Property {
    /// A statement about a thing `{o}`.
    statements: [&'static str; 3],
    /// A statement about a goal: To ... you need something that ...
    needs: &'static str,
    goals: [&'static str; 3],
    things: [&'static str; 6],
}

/// Lists the statements, the need, the goals and the things of each property.
const PROPERTIES: [&str; 12] = [
    "{o} holds water. | You can fill {o} with water. | Water stays in {o}. | holds water | carry milk home | \
     boil some tea | give the goat a drink | bucket | jug | kettle | bottle | barrel | bowl",
    "{o} is sharp. | You can cut with {o}. | Mind your fingers when you hold {o}. | is sharp | split the cheese | \
     open the sack of flour | trim the hedge | knife | axe | saw | sickle | razor | chisel",
    "{o} floats. | On the lake {o} does not sink. | You can see {o} drift down the river. | floats | \
     cross the lake | mark a place on the water | stay above the flood | raft | boat | cork | plank | log | duck",
    "{o} gives light. | With {o} it is bright. | At night they lit {o}. | gives light | read after sunset | \
     find the way in the cave | look into the dark well | lamp | candle | torch | lantern | match | fire",
    "{o} keeps you warm. | In winter you want {o}. | Nobody freezes with {o}. | keeps you warm | \
     walk through the snow | sleep outside in the frost | ride a sledge | coat | scarf | shawl | cloak | glove | \
     blanket",
    "{o} is heavy. | No child can lift {o}. | The wind does not move {o}. | is heavy | hold the door open | \
     press the grapes | keep the lid down | stone | anvil | brick | millstone | anchor | statue",
    "{o} burns well. | They threw {o} on the fire. | Soon {o} turns to ashes. | burns well | heat the oven | \
     send up smoke | warm the stove | twig | branch | log | coal | rag | broom",
    "{o} is long and thin. | You can tie a knot with {o}. | Wind {o} round a post. | can be tied | \
     lead the donkey | hang up the washing | fasten the boat | rope | string | ribbon | belt | chain | wire",
    "{o} is loud. | You can hear {o} from far away. | {o} makes a noise. | is loud | call the village together | \
     wake the guard | scare the crows | bell | drum | horn | whistle | gong | trumpet",
    "{o} is soft. | It is nice to lie on {o}. | Nothing breaks when it falls on {o}. | is soft | pack the eggs | \
     rest your head | sit on the hard bench | pillow | cushion | feather | sponge | blanket | mattress",
    "{o} is good to eat. | A hungry child wants {o}. | {o} tastes sweet. | is good to eat | feed the guests | \
     please a hungry child | fill your lunch box | pear | plum | apple | cake | biscuit | bun",
    "{o} rolls. | Down the hill goes {o}. | {o} turns round and round. | rolls | move the heavy sacks | \
     bring the harvest home | race down the slope | cart | barrow | wheel | wagon | barrel | coach",
];

/// Returns property `index`.
fn property(index: usize) -> Property {
    let [s1, s2, s3, needs, g1, g2, g3, things @ ..] = parts::<13>(PROPERTIES[index]);
    Property { statements: [s1, s2, s3], needs, goals: [g1, g2, g3], things }
}

/// Makes a goal and a thing that serves it: the key of the split.
fn draw(world: &World, rng: &mut Rng, split: Split) -> (usize, usize, usize) {
    loop {
        let (property, goal, thing) = (rng.below(PROPERTIES.len()), rng.below(3), rng.popular(6));
        if world.split(Probe::Piqa, &[property as u64, goal as u64, thing as u64]) == split {
            return (property, goal, thing);
        }
    }
}

fn goal(property: usize, goal: usize) -> String {
    format!("How do you {}?", self::property(property).goals[goal])
}

fn way(thing: &str) -> String {
    format!("Use {}.", a(thing))
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (property, which, thing) = draw(world, rng, split);
    let fitting = self::property(property).things;
    let other = loop {
        let other = self::property(rng.below(PROPERTIES.len())).things[rng.popular(6)];
        if !fitting.contains(&other) {
            break other;
        }
    };
    let (ways, label) = rng.mingle(way(fitting[thing]), vec![way(other)]);
    let [sol1, sol2] = ways.try_into().expect("one right and one wrong way");
    Item::Piqa { goal: goal(property, which), sol1, sol2, label }
}

/// Makes several goals, each with a thing that serves it.
pub(super) fn advice(world: &World, rng: &mut Rng) -> String {
    let asked = (0..rng.between(2, 5)).map(|_| {
        let (property, which, thing) = draw(world, rng, Split::Train);
        format!(
            "Question: {}\nAnswer: {}",
            goal(property, which),
            way(self::property(property).things[thing])
        )
    });
    asked.collect::<Vec<_>>().join("\n\n")
}

/// Makes a text of what some things can do and some goals need.
pub(super) fn lesson(rng: &mut Rng) -> String {
    let property = property(rng.below(PROPERTIES.len()));
    let mut sentences = Vec::new();
    if rng.one_in(3) {
        let goal = rng.pick(&property.goals);
        sentences.push(format!("To {goal} you need something that {}.", property.needs));
    }
    let first = rng.popular(6);
    for thing in first..first + rng.between(2, 4) {
        let thing = a(property.things[thing % 6]);
        sentences.push(capital(&fill(rng.pick(&property.statements), &[("o", &thing)])));
    }
    sentences.join(" ")
}
