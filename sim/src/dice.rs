//! Chance from a seed. Each part of a scenario has dice of its own (`fork`), so that a change in one does not shift all others.

use std::ops::RangeInclusive;

use crate::Micros;

/// Dice: splitmix64.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

/// Spreads values over 64 bits; order matters.
pub(crate) fn mix(values: &[u64]) -> u64 {
    values.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, value| (hash ^ value).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29))
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(&[seed, 0x5eed]))
    }

    /// Dice for one part of what these are for.
    pub(crate) fn fork(&self, part: &str) -> Self {
        Self(part.bytes().fold(self.0, |hash, byte| mix(&[hash, u64::from(byte)])))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Within a range, both ends included.
    pub(crate) fn within(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.next() % (range.end() - range.start() + 1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize].clone()
    }

    /// In (0, 1].
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Time to the next of events that come at random, `mean` apart.
    pub(crate) fn wait(&mut self, mean: Micros) -> Micros {
        (-libm::log(self.unit()) * mean as f64) as Micros
    }

    /// A heavy tail: mostly near `least`, seldom near `most` (Pareto with an exponent of 1.2).
    pub(crate) fn heavy(&mut self, least: u64, most: u64) -> u64 {
        let drawn = least as f64 * libm::pow(self.unit(), -1.0 / 1.2);
        (drawn as u64).clamp(least, most)
    }
}
