//! Zero points of a quantised matrix, and how integers are taken out of words.

use crate::formats::{FileSlice, TensorFiles};

/// The zero point of an output and a group.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Zeros {
    /// Half of the codes' range.
    Middle,
    /// `[group][n / 8]` words; `less_one`: the zero point less one is stored, modulo what a code can be, so that all ones are 0.
    ByGroup { name: String, awq: bool, less_one: bool },
    /// `[n / 8][group]` words.
    ByRow { name: String, groups: usize },
    /// `[n][group]` signed bytes, or one for all.
    Bytes { name: String, groups: usize, all: bool },
}

/// Where in a word of eight an output's nibble is, in AWQ.
pub(super) const AWQ_SLOTS: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Zero points, to be read.
pub(super) struct ZeroReader<'a> {
    zeros: &'a Zeros,
    bytes: Option<FileSlice>,
    bits: u32,
    outputs: usize,
}

impl<'a> ZeroReader<'a> {
    /// Of codes of so many bits, and so many outputs.
    pub(super) fn new(zeros: &'a Zeros, files: &TensorFiles, bits: u32, outputs: usize) -> Self {
        let bytes = match zeros {
            Zeros::Middle => None,
            Zeros::ByGroup { name, .. } | Zeros::ByRow { name, .. } | Zeros::Bytes { name, .. } => files.bytes(name),
        };
        Self { zeros, bytes, bits, outputs }
    }

    /// The zero point of an output and a group.
    pub(super) fn get(&self, n: usize, g: usize) -> i32 {
        let (middle, per_word) = (1 << (self.bits - 1), (32 / self.bits) as usize);
        let Some(bytes) = &self.bytes else { return middle };
        let slot = (n % per_word) as u32;
        match self.zeros {
            Zeros::Middle => middle,
            Zeros::ByGroup { awq, less_one, .. } => {
                let slot = if *awq { AWQ_SLOTS[n % 8] } else { slot };
                let word = word(bytes, g * self.outputs.div_ceil(per_word) + n / per_word);
                let stored = unpacked(word, slot, self.bits) + u32::from(*less_one);
                unpacked(stored, 0, self.bits).cast_signed()
            }
            Zeros::ByRow { groups, .. } => unpacked(word(bytes, n / per_word * groups + g), slot, self.bits).cast_signed(),
            Zeros::Bytes { groups, all, .. } => {
                let at = if *all { 0 } else { n * groups + g };
                i32::from(bytes.as_ref()[at].cast_signed()) + middle
            }
        }
    }

    /// The least and the largest zero point.
    pub(super) fn within(&self, groups: usize) -> [i32; 2] {
        if self.bytes.is_none() {
            return [self.get(0, 0); 2];
        }
        let all = (0..self.outputs).flat_map(|n| (0..groups).map(move |g| (n, g))).map(|(n, g)| self.get(n, g));
        all.fold([i32::MAX, i32::MIN], |[least, most], zero| [least.min(zero), most.max(zero)])
    }
}

/// A word of a tensor.
pub(super) fn word(bytes: &FileSlice, index: usize) -> u32 {
    let bytes = &bytes.as_ref()[index * 4..][..4];
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The integer in a slot of a word.
pub(super) fn unpacked(word: u32, slot: u32, bits: u32) -> u32 {
    word >> (slot * bits) & ((1 << bits) - 1)
}
