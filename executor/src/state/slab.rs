//! The sequences that are known, each at its own place: found by index, never searched for.

use super::batch::SequenceId;
use super::sequence::Sequence;

/// All known sequences.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    places: Vec<Option<Sequence>>,
    free: Vec<u32>,
    /// Sequences ever added.
    number: u64,
}

impl Sequences {
    /// Adds the sequence that `make` gives for its id.
    pub(crate) fn add(&mut self, make: impl FnOnce(SequenceId) -> Sequence) -> SequenceId {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() as u32 - 1
        });
        let id = SequenceId::new(self.number, place as usize);
        self.number += 1;
        self.places[place as usize] = Some(make(id));
        id
    }

    pub(crate) fn remove(&mut self, id: SequenceId) -> Sequence {
        let sequence = self.places[id.place()].take_if(|sequence| sequence.id == id).expect("callers looked it up");
        self.free.push(id.place() as u32);
        sequence
    }

    pub(crate) fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.places.get(id.place())?.as_ref().filter(|sequence| sequence.id == id)
    }

    pub(crate) fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.places.get_mut(id.place())?.as_mut().filter(|sequence| sequence.id == id)
    }

    /// All of them, by place.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.places.iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.places.iter_mut().flatten()
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Whether there is none.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::ops::Index<SequenceId> for Sequences {
    type Output = Sequence;

    fn index(&self, id: SequenceId) -> &Sequence {
        self.get(id).expect("callers looked it up")
    }
}

impl std::ops::IndexMut<SequenceId> for Sequences {
    fn index_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.get_mut(id).expect("callers looked it up")
    }
}
