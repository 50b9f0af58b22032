//! Norms: docs/numerics.md, rule 4.

use crate::ops::NormKind;

/// One row: `dst = norm(src)`.
pub(super) fn norm_row(dst: &mut [f32], src: &[f32], kind: NormKind, eps: f32, weight: &[f32], bias: Option<&[f32]>) {
    assert_eq!(weight.len(), src.len(), "a norm weight for each element");
    let count = src.len() as f32;
    let (mean, weight_offset) = match kind {
        NormKind::Rms { weight_offset } => (None, weight_offset),
        NormKind::Layer => (Some(lane_sum(src, |acc, x| acc + x) / count), 0.0),
    };
    let centred = |x: f32| mean.map_or(x, |mean| x - mean);
    let squares = lane_sum(src, |acc, x| centred(x).mul_add(centred(x), acc));
    let inverse = 1.0 / (squares / count + eps).sqrt();
    for (j, (dst, &x)) in dst.iter_mut().zip(src).enumerate() {
        let w = if weight_offset == 0.0 { weight[j] } else { weight_offset + weight[j] };
        let y = (centred(x) * inverse) * w;
        *dst = bias.map_or(y, |bias| y + bias[j]);
    }
}

/// Sixteen partial sums, element j into lane j % 16, then added by halving.
fn lane_sum(x: &[f32], step: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (j, &x) in x.iter().enumerate() {
        lanes[j % 16] = step(lanes[j % 16], x);
    }
    halving_sum(lanes)
}

/// Lane i with i + 8, then i + 4, i + 2, i + 1.
pub(super) fn halving_sum(mut lanes: [f32; 16]) -> f32 {
    for step in [8, 4, 2, 1] {
        for i in 0..step {
            lanes[i] += lanes[i + step];
        }
    }
    lanes[0]
}
