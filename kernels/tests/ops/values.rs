//! Seeded inputs that hurt: denormals, extremes, all-equal rows, zeros; and random bytes of every format.

use ashlar_kernels::format::{Dtype, TensorView};
use half::{bf16, f16};

/// SplitMix64: small, seeded, good enough for inputs.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Within -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Within a few units, as activations are.
    pub(crate) fn tame(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit() * self.unit() * 4.0).collect()
    }

    /// Rows of `width`, each of one kind of trouble.
    pub(crate) fn wild(&mut self, rows: usize, width: usize) -> Vec<f32> {
        (0..rows).flat_map(|_| self.wild_row(width)).collect()
    }

    fn wild_row(&mut self, width: usize) -> Vec<f32> {
        match self.below(9) {
            0 => vec![0.0; width],
            1 => vec![self.unit() * 3.0; width],
            2 => (0..width).map(|_| f32::from_bits(self.next() as u32 & 0x807f_ffff)).collect(),
            3 => (0..width).map(|_| self.unit() * 1e-37).collect(),
            4 => (0..width).map(|_| self.unit() * 1e18).collect(),
            5 => (0..width).map(|_| self.unit() * 10f32.powi(self.below(30) as i32 - 15)).collect(),
            6 => {
                let mut row = vec![0.0; width];
                row[self.below(width)] = self.unit() * 2.0;
                row
            }
            _ => self.tame(width),
        }
    }

    /// Bytes of a tensor: codes over their whole range (also what no quantiser writes), scales finite.
    pub(crate) fn tensor(&mut self, dtype: Dtype, rows: usize, cols: usize) -> Tensor {
        let bytes = dtype.bytes(rows, cols).expect("a shape that the format can have");
        let mut out: Vec<u8> = Vec::with_capacity(bytes);
        match dtype {
            Dtype::F32 => (0..rows).for_each(|_| self.wild_row(cols).iter().for_each(|w| out.extend(w.to_le_bytes()))),
            Dtype::F16 | Dtype::Bf16 => {
                let exponent = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
                for _ in 0..rows {
                    // One row in four of any finite pattern; in the others the order of additions shows in the last bits.
                    let wild = self.below(4) == 0;
                    for _ in 0..cols {
                        let (bits, weight) = (self.next() as u16, self.unit());
                        let tame = if dtype == Dtype::F16 { f16::from_f32(weight).to_bits() } else { bf16::from_f32(weight).to_bits() };
                        let finite = if bits & exponent == exponent { bits & !0x4000 } else { bits };
                        out.extend(if wild { finite } else { tame }.to_le_bytes());
                    }
                }
            }
            Dtype::Fp8 { .. } => {
                let [codes, scales, _] = dtype.sections(rows, cols).unwrap();
                out.extend((0..codes).map(|_| self.next() as u8).map(|code| if code & 0x7f == 0x7f { 1 } else { code }));
                (0..scales / 4).for_each(|_| {
                    let scale = match self.below(8) {
                        0 => 0.0,
                        1 => self.unit() * 1e-38,
                        2 => self.unit() * 1e9,
                        _ => self.unit() * 0.01,
                    };
                    out.extend(scale.to_le_bytes());
                });
            }
            Dtype::Int4Zero { .. } => {
                let [codes, scales, zeros] = dtype.sections(rows, cols).unwrap();
                out.extend((0..codes).map(|_| self.next() as u8));
                (0..scales / 2).for_each(|_| out.extend(self.scale().to_le_bytes()));
                out.extend((0..zeros).map(|_| self.below(17) as u8));
            }
            planar if planar.sections(rows, cols).is_some() => {
                let [codes, scales, minima] = planar.sections(rows, cols).unwrap();
                out.extend((0..codes).map(|_| self.next() as u8));
                (0..(scales + minima) / 2).for_each(|_| out.extend(self.scale().to_le_bytes()));
            }
            _ => {
                let size = bytes / (rows * cols / dtype.block_columns()).max(1);
                while out.len() < bytes {
                    let at = out.len();
                    out.extend((0..size).map(|_| self.next() as u8));
                    for half in half_offsets(dtype) {
                        let scale = self.scale().to_le_bytes();
                        out[at + half..at + half + 2].copy_from_slice(&scale);
                    }
                }
            }
        }
        assert_eq!(out.len(), bytes);
        Tensor { dtype, rows, cols, bytes: out }
    }

    fn scale(&mut self) -> f16 {
        f16::from_f32(match self.below(8) {
            0 => 0.0,
            1 => self.unit() * 1e-7,
            2 => self.unit() * 60_000.0,
            _ => self.unit() * 0.01,
        })
    }
}

/// Where the f16 of a GGUF block lie.
pub(crate) fn half_offsets(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::Q6K => &[208],
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
        _ => &[0, 2],
    }
}

/// An owned tensor.
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }
}
