//! What a launch of a linear layer is told (`kernels/cuda/linear.cuh`): by value where it is of one layer, in a list on the card where it is of several.

use crate::driver::{Address, Argument};

/// Rows through a layer, or through a part of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinearTask {
    pub(crate) weights: Address,
    /// Null where there are none, as minima and bias.
    pub(crate) scales: Address,
    pub(crate) minima: Address,
    pub(crate) bias: Address,
    /// Rows, or their codes, scales and sums: bytes from the launch's base on.
    pub(crate) rows_at: [u64; 3],
    pub(crate) out: Address,
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
}

/// Rows that are quantised.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantiseTask {
    pub(crate) x: Address,
    /// Codes, scales and sums: bytes from the launch's base on.
    pub(crate) to: [u64; 3],
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
}

/// A value that kernels take one of, or a list of.
pub(crate) trait Task {
    /// One, as an argument.
    fn argument(&self) -> Argument;
    /// One, behind others of a list.
    fn append(&self, list: &mut Vec<u32>);
}

/// Two numbers that kernels count by as `int`, in one word.
fn counts(low: usize, high: usize) -> u64 {
    let count = |count: usize| u64::from(i32::try_from(count).expect("kernels count up to 2^31").cast_unsigned());
    count(low) | count(high) << 32
}

fn halves(words: &[u64], list: &mut Vec<u32>) {
    list.extend(words.iter().flat_map(|word| [*word as u32, (word >> 32) as u32]));
}

impl LinearTask {
    fn words(&self) -> [u64; 10] {
        let [x, scales, sums] = self.rows_at;
        let of_layer = [self.weights, self.scales, self.minima, self.bias].map(|address| address.0);
        let [weights, scales_of_layer, minima, bias] = of_layer;
        let (rows, inputs) = (counts(self.rows, self.outputs), counts(self.inputs, self.group));
        [weights, scales_of_layer, minima, bias, x, scales, sums, self.out.0, rows, inputs]
    }
}

impl QuantiseTask {
    fn words(&self) -> [u64; 6] {
        let [codes, scales, sums] = self.to;
        [self.x.0, codes, scales, sums, counts(self.rows, self.inputs), counts(self.group, 0)]
    }
}

impl Task for LinearTask {
    fn argument(&self) -> Argument {
        Argument::TenWords(self.words())
    }

    fn append(&self, list: &mut Vec<u32>) {
        halves(&self.words(), list);
    }
}

impl Task for QuantiseTask {
    fn argument(&self) -> Argument {
        Argument::SixWords(self.words())
    }

    fn append(&self, list: &mut Vec<u32>) {
        halves(&self.words(), list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_what_the_argument_has() {
        let at = |address: u64| Address(address << 32 | 7);
        let task = LinearTask {
            weights: at(1),
            scales: at(2),
            minima: at(3),
            bias: at(4),
            rows_at: [5, 6, 7],
            out: at(8),
            rows: 9,
            outputs: 10,
            inputs: 11,
            group: 12,
        };
        let Argument::TenWords(words) = task.argument() else { panic!("ten words") };
        assert_eq!(words, [1 << 32 | 7, 2 << 32 | 7, 3 << 32 | 7, 4 << 32 | 7, 5, 6, 7, 8 << 32 | 7, 10 << 32 | 9, 12 << 32 | 11]);
        let mut list = Vec::new();
        task.append(&mut list);
        assert_eq!(list.len() * 4, 80);
        assert_eq!((list[0], list[1], list[16], list[17]), (7, 1, 9, 10));
        QuantiseTask { x: at(1), to: [2, 3, 4], rows: 5, inputs: 6, group: 7 }.append(&mut list);
        assert_eq!(list.len() * 4, 80 + 48);
    }
}
