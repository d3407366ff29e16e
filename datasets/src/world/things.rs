//! Uses of things: properties of things, needs of goals, and the choice of a thing for a goal.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{a, capital, fill};
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

const PROPERTIES: [Property; 12] = [
    Property {
        statements: ["{o} holds water.", "You can fill {o} with water.", "Water stays in {o}."],
        needs: "holds water",
        goals: ["carry milk home", "boil some tea", "give the goat a drink"],
        things: ["bucket", "jug", "kettle", "bottle", "barrel", "bowl"],
    },
    Property {
        statements: ["{o} is sharp.", "You can cut with {o}.", "Mind your fingers when you hold {o}."],
        needs: "is sharp",
        goals: ["split the cheese", "open the sack of flour", "trim the hedge"],
        things: ["knife", "axe", "saw", "sickle", "razor", "chisel"],
    },
    Property {
        statements: [
            "{o} floats.",
            "On the lake {o} does not sink.",
            "You can see {o} drift down the river.",
        ],
        needs: "floats",
        goals: ["cross the lake", "mark a place on the water", "stay above the flood"],
        things: ["raft", "boat", "cork", "plank", "log", "duck"],
    },
    Property {
        statements: ["{o} gives light.", "With {o} it is bright.", "At night they lit {o}."],
        needs: "gives light",
        goals: ["read after sunset", "find the way in the cave", "look into the dark well"],
        things: ["lamp", "candle", "torch", "lantern", "match", "fire"],
    },
    Property {
        statements: ["{o} keeps you warm.", "In winter you want {o}.", "Nobody freezes with {o}."],
        needs: "keeps you warm",
        goals: ["walk through the snow", "sleep outside in the frost", "ride a sledge"],
        things: ["coat", "scarf", "shawl", "cloak", "glove", "blanket"],
    },
    Property {
        statements: ["{o} is heavy.", "No child can lift {o}.", "The wind does not move {o}."],
        needs: "is heavy",
        goals: ["hold the door open", "press the grapes", "keep the lid down"],
        things: ["stone", "anvil", "brick", "millstone", "anchor", "statue"],
    },
    Property {
        statements: ["{o} burns well.", "They threw {o} on the fire.", "Soon {o} turns to ashes."],
        needs: "burns well",
        goals: ["heat the oven", "send up smoke", "warm the stove"],
        things: ["twig", "branch", "log", "coal", "rag", "broom"],
    },
    Property {
        statements: ["{o} is long and thin.", "You can tie a knot with {o}.", "Wind {o} round a post."],
        needs: "can be tied",
        goals: ["lead the donkey", "hang up the washing", "fasten the boat"],
        things: ["rope", "string", "ribbon", "belt", "chain", "wire"],
    },
    Property {
        statements: ["{o} is loud.", "You can hear {o} from far away.", "{o} makes a noise."],
        needs: "is loud",
        goals: ["call the village together", "wake the guard", "scare the crows"],
        things: ["bell", "drum", "horn", "whistle", "gong", "trumpet"],
    },
    Property {
        statements: ["{o} is soft.", "It is nice to lie on {o}.", "Nothing breaks when it falls on {o}."],
        needs: "is soft",
        goals: ["pack the eggs", "rest your head", "sit on the hard bench"],
        things: ["pillow", "cushion", "feather", "sponge", "blanket", "mattress"],
    },
    Property {
        statements: ["{o} is good to eat.", "A hungry child wants {o}.", "{o} tastes sweet."],
        needs: "is good to eat",
        goals: ["feed the guests", "please a hungry child", "fill your lunch box"],
        things: ["pear", "plum", "apple", "cake", "biscuit", "bun"],
    },
    Property {
        statements: ["{o} rolls.", "Down the hill goes {o}.", "{o} turns round and round."],
        needs: "rolls",
        goals: ["move the heavy sacks", "bring the harvest home", "race down the slope"],
        things: ["cart", "barrow", "wheel", "wagon", "barrel", "coach"],
    },
];

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
    format!("How do you {}?", PROPERTIES[property].goals[goal])
}

fn way(thing: &str) -> String {
    format!("Use {}.", a(thing))
}

pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (property, which, thing) = draw(world, rng, split);
    let fitting = &PROPERTIES[property].things;
    let other = loop {
        let other = PROPERTIES[rng.below(PROPERTIES.len())].things[rng.popular(6)];
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
        format!("Question: {}\nAnswer: {}", goal(property, which), way(PROPERTIES[property].things[thing]))
    });
    asked.collect::<Vec<_>>().join("\n\n")
}

/// Makes a text of what some things can do and some goals need.
pub(super) fn lesson(rng: &mut Rng) -> String {
    let property = &PROPERTIES[rng.below(PROPERTIES.len())];
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
