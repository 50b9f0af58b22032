//! Inverse frequencies of rotary position embeddings: [`Rope`] parameters to `dim / 2` f32 numbers.
//!
//! The steps and their roundings are those of Hugging Face `transformers` (`modeling_rope_utils.py`), which computes in f32
//! tensors throughout: the exponent `2i / dim` and every product are rounded to f32. Only the power is taken in f64 and
//! rounded once, where torch's vectorised f32 power may be off by one unit in the last place.

use ashlar_zoo::manifest::{Rope, RopeScaling};

/// `dim / 2` inverse frequencies, in radians a token.
pub fn inverse_frequencies(rope: &Rope) -> Vec<f32> {
    let powers = (0..rope.dim / 2).map(|i| power(rope, i));
    match &rope.scaling {
        RopeScaling::None => powers.map(|power| 1.0 / power).collect(),
        RopeScaling::Linear { factor } => powers.map(|power| 1.0 / power / *factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let scale = Llama3::new(*factor, *low_freq_factor, *high_freq_factor, *original_context);
            powers.map(|power| scale.apply(1.0 / power)).collect()
        }
        RopeScaling::Factors { factors, .. } => powers.zip(factors).map(|(power, factor)| 1.0 / (*factor as f32 * power)).collect(),
    }
}

/// What cosines and sines are multiplied by.
pub fn attention_factor(rope: &Rope) -> f32 {
    match &rope.scaling {
        RopeScaling::Factors { attention_factor, .. } => *attention_factor as f32,
        _ => 1.0,
    }
}

/// `theta ^ (2i / dim)`.
fn power(rope: &Rope, i: u32) -> f32 {
    let exponent = (2 * i) as f32 / rope.dim as f32;
    libm::pow(f64::from(rope.theta as f32), f64::from(exponent)) as f32
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between interpolated.
struct Llama3 {
    factor: f32,
    low_freq_factor: f32,
    /// `high_freq_factor - low_freq_factor`.
    range: f32,
    original_context: f32,
    low_wavelength: f32,
    high_wavelength: f32,
}

impl Llama3 {
    fn new(factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: u64) -> Self {
        let original_context = original_context as f64;
        Self {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            range: (high_freq_factor - low_freq_factor) as f32,
            original_context: original_context as f32,
            low_wavelength: (original_context / low_freq_factor) as f32,
            high_wavelength: (original_context / high_freq_factor) as f32,
        }
    }

    fn apply(&self, inverse: f32) -> f32 {
        let wavelength = std::f64::consts::TAU as f32 / inverse;
        if wavelength > self.low_wavelength {
            return inverse / self.factor;
        }
        if wavelength < self.high_wavelength {
            return inverse;
        }
        let smooth = (self.original_context / wavelength - self.low_freq_factor) / self.range;
        (1.0 - smooth) * inverse / self.factor + smooth * inverse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, dim: u32, scaling: RopeScaling) -> Rope {
        Rope { theta, dim, scaling }
    }

    #[test]
    fn plain_frequencies_fall_from_one() {
        let plain = inverse_frequencies(&rope(10000.0, 8, RopeScaling::None));
        assert_eq!(plain, [1.0, 0.1, 0.01, 0.001]);
        let linear = inverse_frequencies(&rope(10000.0, 8, RopeScaling::Linear { factor: 8.0 }));
        assert_eq!(linear, plain.iter().map(|f| f / 8.0).collect::<Vec<_>>());
    }

    #[test]
    fn factors_divide_each_frequency() {
        let scaling = RopeScaling::Factors { factors: vec![1.0, 2.0, 4.0, 8.0], attention_factor: 1.25 };
        let rope = rope(10000.0, 8, scaling);
        assert_eq!(inverse_frequencies(&rope), [1.0, 0.05, 0.0025, 1.0 / (8.0 * 1000.0)]);
        assert_eq!(attention_factor(&rope), 1.25);
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let plain = inverse_frequencies(&rope(500000.0, 128, RopeScaling::None));
        let scaled = inverse_frequencies(&rope(500000.0, 128, scaling));
        for (&plain, &scaled) in plain.iter().zip(&scaled) {
            let wavelength = std::f32::consts::TAU / plain;
            match wavelength {
                w if w < 2048.0 => assert_eq!(scaled, plain),
                w if w > 8192.0 => assert_eq!(scaled, plain / 8.0),
                _ => assert!(scaled < plain && scaled > plain / 8.0),
            }
        }
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
    }
}
