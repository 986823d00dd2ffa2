//! From samples to figures, or to a refusal.
//!
//! Its one job is arithmetic and the table: minima, medians of the differences inside a
//! round, and the two signs of a busy machine, at which it gives no figure. It has no state
//! and no side effects.

use std::{collections::BTreeMap, fmt::Write as _};

use super::Variant;

/// By how much the variant that is there twice may differ from itself.
const CHANCE: f64 = 0.02;

/// How far the median without an agent may lie above its minimum.
const CALM: f64 = 1.15;

/// Nanoseconds by loop and variant, in the order of the rounds.
#[derive(Debug, Default)]
pub(super) struct Samples {
    loops: BTreeMap<String, BTreeMap<Variant, Vec<f64>>>,
}

/// What is reported.
#[derive(Debug)]
pub(super) struct Figures {
    /// A table for each loop that could be told.
    pub(super) text: String,
    /// The loops that could not, each with the reason.
    pub(super) refused: Vec<String>,
}

impl Samples {
    pub(super) fn add(&mut self, name: &str, variant: Variant, nanoseconds: f64) {
        self.loops
            .entry(name.to_owned())
            .or_default()
            .entry(variant)
            .or_default()
            .push(nanoseconds);
    }

    /// The tables, in nanoseconds for one operation; with `busy` also those that tell nothing, each
    /// with the reason.
    pub(super) fn report(&self, variants: &[Variant], busy: bool) -> Figures {
        let mut text = String::new();
        let mut refused = Vec::new();
        for (name, samples) in &self.loops {
            let of = |variant| samples.get(&variant).map_or(&[][..], Vec::as_slice);
            let baseline = of(Variant::NoAgent);
            if let Some(reason) = unfit(baseline, of(Variant::NoAgentAgain)) {
                refused.push(format!("{name} ({reason})"));
                if !busy {
                    continue;
                }
                let _infallible = write!(text, "\nNOISY, tells little: {reason}");
            }
            let _infallible = writeln!(
                text,
                "\n{name:<32} {:>10} {:>10} {:>12} {:>6} {:>12}",
                "minimum", "median", "to no agent", "ratio", "to empty"
            );
            for &variant in variants {
                let values = of(variant);
                let to_empty = match variant {
                    Variant::GuardOnWorkload => of(Variant::EmptyOnOwn),
                    Variant::GuardOnUntagged => of(Variant::EmptyOnForeign),
                    Variant::NoAgent
                    | Variant::NoAgentAgain
                    | Variant::EmptyOnOwn
                    | Variant::EmptyOnForeign => &[],
                };
                let difference = paired(values, to_empty)
                    .map_or_else(String::new, |nanoseconds| format!("{nanoseconds:+.0}"));
                let _infallible = writeln!(
                    text,
                    "{:<32} {:>10.0} {:>10.0} {:>+12.0} {:>6.2} {difference:>12}",
                    variant.name(),
                    minimum(values),
                    median(values.to_vec()),
                    paired(values, baseline).unwrap_or_default(),
                    ratio(values, baseline),
                );
            }
        }
        Figures { text, refused }
    }
}

/// Why the samples of one loop tell nothing, if so.
fn unfit(baseline: &[f64], again: &[f64]) -> Option<String> {
    let middle = median(baseline.to_vec());
    let above = middle / minimum(baseline);
    if above > CALM {
        return Some(format!("the median without an agent is {above:.2} of the minimum"));
    }
    let chance = (paired(again, baseline)? / middle).abs();
    let minima = (minimum(again) / minimum(baseline) - 1.0).abs();
    let worse = chance.max(minima);
    (worse > CHANCE).then(|| format!("no agent differs from no agent by {:.1} %", worse * 100.0))
}

/// The median of the differences inside a round, if there are pairs.
fn paired(values: &[f64], others: &[f64]) -> Option<f64> {
    let differences: Vec<_> = values.iter().zip(others).map(|(one, other)| one - other).collect();
    (!differences.is_empty()).then(|| median(differences))
}

/// The median of the ratios inside a round.
fn ratio(values: &[f64], others: &[f64]) -> f64 {
    median(values.iter().zip(others).map(|(one, other)| one / other).collect())
}

fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match (values.get(half), values.len() % 2) {
        (None, _) => f64::NAN,
        (Some(upper), 1) => *upper,
        (Some(upper), _) => (upper + values[half - 1]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(no_agent: &[f64], again: &[f64], empty: &[f64]) -> Samples {
        let mut samples = Samples::default();
        for (variant, values) in [
            (Variant::NoAgent, no_agent),
            (Variant::NoAgentAgain, again),
            (Variant::EmptyOnOwn, empty),
        ] {
            for value in values {
                samples.add("connect", variant, *value);
            }
        }
        samples
    }

    #[test]
    fn a_difference_is_the_median_of_pairs() {
        assert_eq!(paired(&[11.0, 22.0, 133.0], &[10.0, 20.0, 30.0]), Some(2.0));
        assert_eq!(paired(&[], &[]), None);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
    }

    #[test]
    fn a_calm_machine_gets_its_table() {
        let samples = samples(&[100.0, 101.0, 102.0], &[100.5, 101.0, 102.0], &[190.0; 3]);
        let figures = samples.report(&[Variant::NoAgent, Variant::EmptyOnOwn], false);
        assert!(figures.refused.is_empty());
        assert!(figures.text.contains("+89"), "{}", figures.text);
    }

    #[test]
    fn two_equal_variants_that_differ_are_refused() {
        let figures =
            samples(&[100.0; 3], &[103.0; 3], &[190.0; 3]).report(&[Variant::EmptyOnOwn], false);
        assert_eq!(figures.refused, ["connect (no agent differs from no agent by 3.0 %)"]);
        assert!(figures.text.is_empty());
    }

    #[test]
    fn a_median_far_above_the_minimum_is_refused() {
        let noisy = [100.0, 120.0, 121.0];
        let samples = samples(&noisy, &noisy, &[190.0; 3]);
        let figures = samples.report(&[Variant::NoAgent], false);
        assert_eq!(figures.refused.len(), 1);
        assert!(figures.text.is_empty());
        let shown = samples.report(&[Variant::NoAgent], true);
        assert!(shown.text.contains("NOISY"), "{}", shown.text);
    }
}
