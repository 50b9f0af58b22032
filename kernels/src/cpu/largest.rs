//! Where each row's largest element is: what greedy sampling asks of logits. Limited by one read of the rows.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::Lanes;
use super::memory::Shared;

/// Elements whose maximum is taken before it is compared with the best so far: the place is sought in few of them.
const STRETCH: usize = 512;

/// Rows `rows` of dense `x`.
pub(super) struct Largest<'a> {
    pub(super) x: &'a [f32],
    pub(super) width: usize,
    pub(super) out: Shared<'a, Option<u32>>,
    pub(super) rows: Range<usize>,
}

impl Kernel for Largest<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        // SAFETY: units have disjoint rows.
        let out = unsafe { self.out.part(self.rows.clone()) };
        for (out, row) in out.iter_mut().zip(self.rows) {
            let (mut best, mut place) = (f32::NEG_INFINITY, None);
            for (index, stretch) in self.x[row * self.width..][..self.width].chunks(STRETCH).enumerate() {
                let largest = maximum(s, stretch);
                if largest > best {
                    let within = stretch.iter().position(|x| *x == largest).expect("the maximum is one of them");
                    (best, place) = (largest, Some((index * STRETCH + within) as u32));
                }
            }
            *out = place;
        }
    }
}

/// The largest of `x` that is a number; negative infinity if there is none.
#[inline(always)]
fn maximum<S: Lanes>(s: S, x: &[f32]) -> f32 {
    // `max` gives its second operand where the first is NaN.
    let mut sums = [s.splat(f32::NEG_INFINITY); 4];
    let (quads, rest) = x.as_chunks::<64>();
    for quad in quads {
        let (lanes, _) = quad.as_chunks::<16>();
        for (largest, lanes) in sums.iter_mut().zip(lanes) {
            *largest = s.max(s.load(lanes), *largest);
        }
    }
    let [a, b, c, d] = sums;
    let largest = s.max_lane(s.max(s.max(a, b), s.max(c, d)));
    rest.iter().fold(largest, |largest, x| if *x > largest { *x } else { largest })
}
