//! Hands out the numbers that the kernel and the records carry in place of names.
//!
//! Knows nothing of what is numbered: identities, scopes and grants each have numbers of their
//! own. One writer.

use std::collections::BTreeMap;

/// A number for each name: never zero, never given to another name while the process lives, so a
/// record that is read late still finds the name it was made for.
///
/// Names are therefore never forgotten; each costs its own size twice and a few words.
#[derive(Clone, Debug)]
pub struct Numbers<K> {
    numbers: BTreeMap<K, u32>,
    /// The name of number `n` is at `n - 1`.
    names: Vec<K>,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self { numbers: BTreeMap::new(), names: Vec::new() }
    }
}

impl<K: Ord + Clone> Numbers<K> {
    /// The number of `name`, a new one if it has none yet.
    pub fn number(&mut self, name: &K) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.names.push(name.clone());
        let number = u32::try_from(self.names.len())
            .expect("four billion names do not fit in the memory of the process");
        self.numbers.insert(name.clone(), number);
        number
    }

    /// The number of `name`, if it has one.
    #[must_use]
    pub fn find(&self, name: &K) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// The name that has `number`.
    #[must_use]
    pub fn name(&self, number: u32) -> Option<&K> {
        let place = usize::try_from(number.checked_sub(1)?).ok()?;
        self.names.get(place)
    }

    /// How many names have a number.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether no name has a number.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_name_keeps_a_number_of_its_own(names in prop::collection::vec("[a-d]{1,2}", 0..60)) {
            let mut numbers = Numbers::default();
            let given: Vec<u32> = names.iter().map(|name| numbers.number(name)).collect();
            for (name, number) in names.iter().zip(given) {
                prop_assert_ne!(number, 0);
                prop_assert_eq!(numbers.find(name), Some(number));
                prop_assert_eq!(numbers.name(number), Some(name));
            }
        }
    }

    #[test]
    fn zero_and_numbers_not_given_name_nothing() {
        let mut numbers = Numbers::default();
        assert!(numbers.is_empty());
        assert_eq!(numbers.number(&"a"), 1);
        assert_eq!((numbers.name(0), numbers.name(2), numbers.find(&"b")), (None, None, None));
        assert_eq!(numbers.len(), 1);
    }
}
