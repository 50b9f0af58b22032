//! Launches as they were asked for, one after the other: what a step of a model is to the card.

use std::ops::Range;

use crate::driver::{Argument, Launch};

/// Launches in order. Kept between steps, so that recording allocates nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tape {
    entries: Vec<Entry>,
    arguments: Vec<Argument>,
    /// Of the kernels' names in order: tapes with another key are unlike.
    key: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    arguments: Range<usize>,
}

impl Tape {
    pub(crate) fn push(&mut self, launch: &Launch<'_>) {
        let Launch { kernel, grid, threads, shared_bytes, arguments } = *launch;
        // Names are constants of the binary, so their places tell them apart; what agrees by chance is compared all the same.
        self.key = (self.key.rotate_left(5) ^ kernel.as_ptr() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let begin = self.arguments.len();
        self.arguments.extend_from_slice(arguments);
        self.entries.push(Entry { kernel, grid, threads, shared_bytes, arguments: begin..self.arguments.len() });
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.arguments.clear();
        self.key = 0;
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    pub(crate) fn launch(&self, place: usize) -> Launch<'_> {
        let Entry { kernel, grid, threads, shared_bytes, ref arguments } = self.entries[place];
        Launch { kernel, grid, threads, shared_bytes, arguments: &self.arguments[arguments.clone()] }
    }

    pub(crate) fn launches(&self) -> impl Iterator<Item = Launch<'_>> {
        (0..self.len()).map(|place| self.launch(place))
    }

    /// Places whose launches differ in anything but their kernel, ascending; `None` when there are more than `most`, or when the kernels differ.
    pub(crate) fn changes(&self, other: &Self, most: usize) -> Option<Vec<usize>> {
        if self.len() != other.len() || self.arguments.len() != other.arguments.len() {
            return None;
        }
        let mut changed = Vec::new();
        for (place, (a, b)) in std::iter::zip(&self.entries, &other.entries).enumerate() {
            if a.kernel != b.kernel {
                return None;
            }
            if a != b || self.arguments[a.arguments.clone()] != other.arguments[b.arguments.clone()] {
                changed.push(place);
                if changed.len() > most {
                    return None;
                }
            }
        }
        Some(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tape(launches: &[(&'static str, u32, &[Argument])]) -> Tape {
        let mut tape = Tape::default();
        for &(kernel, ctas, arguments) in launches {
            tape.push(&Launch { kernel, grid: [ctas, 1, 1], threads: 32, shared_bytes: 0, arguments });
        }
        tape
    }

    #[test]
    fn changes_are_of_grids_and_arguments() {
        const ADD: &str = "add";
        const NORM: &str = "norm_rows";
        let [one, two, float] = [Argument::Int(1), Argument::Int(2), Argument::Float(1.0)];
        let first = tape(&[(ADD, 1, &[one, two]), (NORM, 1, &[one]), (ADD, 1, &[one, two])]);
        assert_eq!(first.changes(&first.clone(), 0), Some(vec![]));
        let others = tape(&[(ADD, 1, &[one, one]), (NORM, 2, &[one]), (ADD, 1, &[one, two])]);
        assert_eq!((first.changes(&others, 2), first.changes(&others, 1)), (Some(vec![0, 1]), None));
        assert_eq!(first.key(), others.key());
        // A number of another kind, and arguments that another launch has.
        let kinds = tape(&[(ADD, 1, &[one, two]), (NORM, 1, &[float]), (ADD, 1, &[one, two])]);
        assert_eq!(first.changes(&kinds, 3), Some(vec![1]));
        let moved = tape(&[(ADD, 1, &[one]), (NORM, 1, &[two, one]), (ADD, 1, &[one, two])]);
        assert_eq!(first.changes(&moved, 3), Some(vec![0, 1]));
        let unlike = tape(&[(ADD, 1, &[one, two]), (ADD, 1, &[one]), (ADD, 1, &[one, two])]);
        assert!(first.changes(&unlike, 3).is_none() && first.key() != unlike.key());
        let launched: Vec<u32> = others.launches().map(|launch| launch.grid[0]).collect();
        assert_eq!(launched, [1, 2, 1]);
    }
}
