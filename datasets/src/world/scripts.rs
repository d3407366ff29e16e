//! Activities as sequences of steps: which step comes next, and with what.

use super::item::Item;
use super::land::{Probe, Split, World};
use super::lore::{fill, parts};
use super::rng::Rng;

/// An activity whose steps all concern the same `{v}`.
struct Script {
    label: &'static str,
    variants: [&'static str; 4],
    steps: [&'static str; 5],
}

/// Lists the label, the variants and the steps of each script.
const SCRIPTS: [&str; 12] = [
    "Baking bread | rye | wheat | oat | corn | takes {v} flour and water | kneads the {v} dough | \
     lets the {v} dough rest | puts the {v} loaf into the oven | cuts the warm {v} bread",
    "Catching fish | trout | carp | perch | pike | rows out to where the {v} swim | throws the net over the {v} | \
     pulls the {v} into the boat | cleans the {v} on the shore | sells the {v} at the market",
    "Making a bowl | red | white | grey | brown | digs {v} clay at the river | turns the {v} clay on the wheel | \
     dries the {v} bowl in the sun | burns the {v} bowl in the kiln | paints a bird on the {v} bowl",
    "Planting a tree | pear | plum | apple | cherry | digs a hole for the {v} tree | \
     sets the {v} tree into the hole | waters the {v} tree every day | waits for the {v} blossom | \
     picks the first ripe {v}",
    "Weaving a blanket | blue | green | yellow | black | washes wool for the {v} blanket | \
     puts the wool into {v} dye | spins the {v} wool | sets the {v} thread on the loom | weaves the {v} blanket",
    "Building with wood | chair | table | bench | stool | measures the wood for the {v} | \
     saws the boards for the {v} | joins the legs of the {v} | rubs the {v} with oil | \
     carries the {v} into the house",
    "Cooking soup | bean | onion | cabbage | mushroom | washes a pot for the {v} soup | \
     chops everything for the {v} soup | puts the {v} soup on the fire | stirs the {v} soup with a spoon | \
     eats the hot {v} soup",
    "Working at the forge | nail | hook | knife | hinge | heats the iron for the {v} | \
     hammers the iron into a {v} | bends the end of the {v} | cools the {v} in water | hangs the {v} on the wall",
    "Sewing clothes | coat | shirt | skirt | cloak | chooses the cloth for the {v} | cuts the cloth for the {v} | \
     sews the parts of the {v} | puts buttons on the {v} | wears the {v} on Sunday",
    "Taking honey | lime | clover | heather | thistle | makes smoke for the {v} bees | \
     lifts out the combs with {v} honey | lets the {v} honey run into a jar | closes the jar of {v} honey | \
     gives the {v} honey to a neighbour",
    "Washing an animal | dog | pony | goat | sheep | fills a tub for the {v} | leads the {v} to the tub | \
     pours water over the {v} | brushes the {v} | lets the {v} run in the sun",
    "Painting | door | fence | gate | wall | mixes paint for the {v} | scrapes the old {v} | \
     spreads the paint on the {v} | lets the {v} dry | shows the new {v} to everyone",
];

/// Returns script `index`.
fn script(index: usize) -> Script {
    let [label, a, b, c, d, steps @ ..] = parts::<10>(SCRIPTS[index]);
    Script { label, variants: [a, b, c, d], steps }
}

fn step(script: &Script, step: usize, variant: &str) -> String {
    fill(script.steps[step], &[("v", variant)])
}

/// Writes `label: Name first. Then she second. ...`, for the steps of `range`.
fn told(script: &Script, steps: std::ops::Range<usize>, variant: &str, name: &str, pronoun: &str) -> String {
    let mut text = format!("{}: {name}", script.label);
    for at in steps.clone() {
        if at > steps.start {
            text += &format!(" Then {pronoun}");
        }
        text += &format!(" {}.", step(script, at, variant));
    }
    text
}

/// Makes a script, a variant of it, and a range of its steps whose last is what is asked for. That last step with its
/// script and variant is the key of the split; steps for training are of training keys from the second on.
fn draw(world: &World, rng: &mut Rng, split: Split) -> (usize, usize, usize, usize) {
    loop {
        let (script, variant, next) = (rng.below(SCRIPTS.len()), rng.popular(4), rng.between(1, 4));
        let first = next - rng.between(1, next.min(2));
        let of = |step| world.split(Probe::HellaSwag, &[script as u64, variant as u64, step as u64]);
        if of(next) == split && (split == Split::Test || (first + 1..next).all(|step| of(step) == split)) {
            return (script, variant, first, next);
        }
    }
}

/// Makes an item. Wrong endings are another step of the script, the right step with another variant, and a step of
/// another script.
pub(super) fn item(world: &World, rng: &mut Rng, split: Split) -> Item {
    let (index, variant, first, next) = draw(world, rng, split);
    let script = &script(index);
    let variant = script.variants[variant];
    let other_step = loop {
        let other = rng.below(script.steps.len());
        if other != next && other + 1 != next {
            break other;
        }
    };
    let other_variant = rng.pick_where(&script.variants, |other| other != variant);
    let other_script = &self::script((index + rng.between(1, SCRIPTS.len() - 1)) % SCRIPTS.len());
    let wrong = vec![
        step(script, other_step, variant),
        step(script, next, other_variant),
        step(other_script, rng.below(5), rng.pick(&other_script.variants)),
    ];
    let (endings, label) = rng.mingle(step(script, next, variant), wrong);
    let endings = endings.into_iter().map(|ending| format!("{ending}.")).collect();

    let [person, _] = world.cast(rng);
    let before = told(script, first..next, variant, &person.name, person.pronoun);
    let ctx_a = before[script.label.len() + 2..].to_owned();
    let ctx_b = format!("then {}", person.pronoun);
    let ctx = format!("{ctx_a} {ctx_b}");
    Item::HellaSwag { activity_label: script.label.to_owned(), ctx_a, ctx_b, ctx, endings, label }
}

/// Makes two or three steps of a script, under its label.
pub(super) fn entry(world: &World, rng: &mut Rng) -> String {
    let (script, variant, first, next) = draw(world, rng, Split::Train);
    let [person, _] = world.cast(rng);
    let script = &self::script(script);
    told(script, first..next + 1, script.variants[variant], &person.name, person.pronoun)
}

/// Makes all of a script, as something that a person does one day.
pub(super) fn day(world: &World, rng: &mut Rng) -> String {
    let script = &script(rng.below(SCRIPTS.len()));
    let variant = script.variants[rng.popular(4)];
    let [person, _] = world.cast(rng);
    let mut text = format!("It is time for {}. {}", script.label.to_lowercase(), person.name);
    for at in 0..script.steps.len() {
        if at > 0 {
            text += rng.pick(&[" Next ", " After that ", " Now "]);
            text += person.pronoun;
        }
        text += &format!(" {}.", step(script, at, variant));
    }
    text
}
