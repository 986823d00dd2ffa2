//! All scopes of this node by the name that grants and tokens say.

use std::collections::{BTreeMap, btree_map::Entry};

use super::document::{ScopeDocument, ScopeName};

/// Scopes, each under a name of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    scopes: BTreeMap<ScopeName, ScopeDocument>,
}

/// Two documents define the same scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("scope {scope} is defined by {first} and by {second}; keep one of the two")]
pub struct DuplicateScope {
    pub scope: ScopeName,
    pub first: crate::name::ResourceName,
    pub second: crate::name::ResourceName,
}

impl Catalogue {
    /// Takes all of `documents`.
    ///
    /// # Errors
    ///
    /// When two of them define the same scope.
    pub fn new(documents: impl IntoIterator<Item = ScopeDocument>) -> Result<Self, DuplicateScope> {
        let mut catalogue = Self::default();
        documents.into_iter().try_for_each(|document| catalogue.insert(document))?;
        Ok(catalogue)
    }

    /// Adds one document.
    ///
    /// # Errors
    ///
    /// When its scope is defined already; the catalogue then stays as it was.
    pub fn insert(&mut self, document: ScopeDocument) -> Result<(), DuplicateScope> {
        match self.scopes.entry(document.scope.clone()) {
            Entry::Vacant(place) => {
                place.insert(document);
                Ok(())
            }
            Entry::Occupied(first) => Err(DuplicateScope {
                first: first.get().name.clone(),
                second: document.name,
                scope: document.scope,
            }),
        }
    }

    /// What `scope` permits, when it is defined.
    #[must_use]
    pub fn get(&self, scope: &ScopeName) -> Option<&ScopeDocument> {
        self.scopes.get(scope)
    }

    /// All scopes in the order of their names.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &ScopeDocument> {
        self.scopes.values()
    }

    /// How many scopes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.scopes.len()
    }

    /// Whether there is no scope at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scopes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(name: &str, scope: &str) -> ScopeDocument {
        ScopeDocument {
            name: name.parse().unwrap(),
            scope: scope.parse().unwrap(),
            description: "a scope".to_owned(),
            egress: Vec::new(),
            exec: vec!["/bin/sh".parse().unwrap()],
            unix_sockets: Vec::new(),
            listen: Vec::new(),
        }
    }

    #[test]
    fn a_scope_is_found_by_the_name_that_grants_say() {
        let catalogue = Catalogue::new([scope("a", "x:read"), scope("b", "x:write")]).unwrap();
        assert_eq!(catalogue.len(), 2);
        let found = catalogue.get(&"x:write".parse().unwrap()).unwrap();
        assert_eq!(found.name.as_str(), "b");
        assert_eq!(catalogue.get(&"x:admin".parse().unwrap()), None);
    }

    #[test]
    fn a_scope_that_is_defined_twice_is_refused() {
        let refused = Catalogue::new([scope("a", "x"), scope("b", "x")]).unwrap_err();
        assert_eq!(refused.to_string(), "scope x is defined by a and by b; keep one of the two");
    }
}
