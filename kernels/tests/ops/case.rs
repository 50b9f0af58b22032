//! Inputs of ops, and what devices make of them: what the suites of all devices share.

use ashlar_kernels::ops::{Bf16Compute, Ops};

/// One input of one op, runnable on any device.
pub(crate) trait Case {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32>;

    /// What the devices compute bf16 weights from.
    fn bf16_compute(&self) -> Bf16Compute {
        Bf16Compute::F32
    }
}

#[track_caller]
pub(crate) fn assert_same(what: &str, expected: &[f32], got: &[f32]) {
    assert_eq!(expected.len(), got.len(), "{what}: lengths");
    for (index, (e, g)) in expected.iter().zip(got).enumerate() {
        // What a NaN's bits are is nobody's contract; inputs that overflow make some.
        assert!(e.to_bits() == g.to_bits() || (e.is_nan() && g.is_nan()), "{what}: element {index} is {g:e}, expected {e:e}");
    }
}

/// A device buffer with these values.
pub(crate) fn upload<O: Ops>(ops: &O, values: &[f32]) -> O::Buffer {
    let mut buffer = ops.buffer(values.len()).unwrap();
    ops.upload(&mut buffer, 0, values);
    buffer
}

pub(crate) fn download<O: Ops>(ops: &O, buffer: &O::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    ops.download(buffer, 0, &mut values);
    values
}
