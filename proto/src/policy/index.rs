//! Which components a selector means, without asking each of them: by name, and by each label.

use std::collections::BTreeMap;

use crate::label::{ComponentName, LabelKey, LabelSet, LabelValue, Selector};

/// One component as rules see it, with whatever the user of the index wants to know about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member<'p, T> {
    pub(super) name: &'p ComponentName,
    pub(super) labels: &'p LabelSet,
    pub(super) extra: T,
}

/// The components of one policy.
#[derive(Debug)]
pub(super) struct Index<'p, T> {
    by_name: BTreeMap<&'p ComponentName, Member<'p, T>>,
    by_label: BTreeMap<(&'p LabelKey, &'p LabelValue), Vec<Member<'p, T>>>,
}

impl<'p, T: Copy> Index<'p, T> {
    pub(super) fn new(members: impl IntoIterator<Item = Member<'p, T>>) -> Self {
        let by_name: BTreeMap<_, _> = members.into_iter().map(|m| (m.name, m)).collect();
        let mut by_label: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for member in by_name.values() {
            for label in member.labels {
                by_label.entry(label).or_default().push(*member);
            }
        }
        Self { by_name, by_label }
    }

    /// The components that `selector` means, by name.
    pub(super) fn members<'s>(&'s self, selector: &'s Selector) -> impl Iterator<Item = Member<'p, T>> + use<'s, 'p, T> {
        let candidates: &[Member<'p, T>] = match selector {
            Selector::Name(name) => self.by_name.get(name).map_or(&[], std::slice::from_ref),
            Selector::Labels(labels) => {
                let lists = labels
                    .iter()
                    .map(|(k, v)| self.by_label.get(&(k, v)).map_or(&[][..], Vec::as_slice));
                lists.min_by_key(|list| list.len()).unwrap_or(&[])
            }
        };
        candidates.iter().copied().filter(move |m| selector.matches(m.name, m.labels))
    }

    /// The names of all components, sorted.
    pub(super) fn names(&self) -> impl Iterator<Item = &'p str> + use<'_, 'p, T> {
        self.by_name.keys().map(|n| n.as_str())
    }

    /// Every label that some component has, sorted.
    pub(super) fn labels(&self) -> impl Iterator<Item = (&'p LabelKey, &'p LabelValue)> + use<'_, 'p, T> {
        self.by_label.keys().copied()
    }
}
