//! A view of all keys under a prefix, and its changes. The store behind it feeds a bounded channel; a reader that falls behind
//! slows its own feeder and nobody else.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::Entry;

/// Changes that may wait for a slow reader.
pub(crate) const CHANGES_MAX: usize = 64;

/// What happened to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It has this value now.
    Put(Entry),
    /// It is gone.
    Delete {
        /// Which.
        key: String,
    },
}

impl Change {
    /// The key it is about.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }
}

/// All keys under a prefix as of the last [`Watch::next`].
#[derive(Debug)]
pub struct Watch {
    view: BTreeMap<String, Entry>,
    changes: mpsc::Receiver<Change>,
    /// The feeder; ends with the watch.
    _feeder: AbortOnDropHandle<()>,
}

impl Watch {
    /// A watch that begins with `view` and whose feeder runs as a task.
    pub(crate) fn new(view: BTreeMap<String, Entry>, changes: mpsc::Receiver<Change>, feeder: tokio::task::JoinHandle<()>) -> Self {
        Self { view, changes, _feeder: AbortOnDropHandle::new(feeder) }
    }

    /// What is under the prefix, by key.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.view
    }

    /// The next change, already applied to [`Watch::entries`]. Dropping the future loses nothing. `None` only when the registry
    /// itself was dropped.
    pub async fn next(&mut self) -> Option<Change> {
        let change = self.changes.recv().await?;
        self.apply(&change);
        Some(change)
    }

    /// Waits for a change, then takes all that have come; false when the registry was dropped.
    pub async fn changed(&mut self) -> bool {
        if self.next().await.is_none() {
            return false;
        }
        while let Ok(change) = self.changes.try_recv() {
            self.apply(&change);
        }
        true
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(entry) => drop(self.view.insert(entry.key.clone(), entry.clone())),
            Change::Delete { key } => drop(self.view.remove(key)),
        }
    }
}

/// What leads from `old` to `new`: deletions first, then puts in order of revision.
pub(crate) fn changes(old: &BTreeMap<String, Entry>, new: &BTreeMap<String, Entry>) -> Vec<Change> {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| Change::Delete { key: key.clone() });
    let mut put: Vec<&Entry> = new.values().filter(|entry| old.get(&entry.key).map(|o| o.revision) != Some(entry.revision)).collect();
    put.sort_by_key(|entry| entry.revision);
    gone.chain(put.into_iter().map(|entry| Change::Put(entry.clone()))).collect()
}
