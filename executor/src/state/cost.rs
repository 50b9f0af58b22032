//! What a segment costs by rows, in time: learned from the batches that ran, or seeded by a profile. Pure numbers; the clock is the caller's.

use std::time::Duration;

/// Rows at which a curve has a value; between them it is a straight line.
const POINTS: [u32; 17] = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096];

/// Share of a new observation in a point that lies on it.
const LEARNING_RATE: f64 = 0.2;

/// Share of a batch's time below which nothing is lost by running a part of it apart.
const APART_LEAST: f64 = 0.05;

/// Time of one segment's batches by their rows. It never falls with more rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CostCurve {
    /// Microseconds at each of `POINTS`; None where nothing like it has run.
    micros: [Option<f64>; POINTS.len()],
    /// The same with those between filled in, so that nobody has to search; of no meaning before anything ran.
    filled: [f64; POINTS.len()],
}

impl CostCurve {
    /// A curve through measured points (rows, time).
    pub fn seeded(profile: &[(u32, Duration)]) -> Self {
        let mut curve = Self::default();
        profile.iter().for_each(|(rows, elapsed)| curve.observe(*rows, *elapsed));
        curve
    }

    /// Learns from a batch of `rows` that took `elapsed`.
    pub fn observe(&mut self, rows: u32, elapsed: Duration) {
        let seen = elapsed.as_secs_f64() * 1e6;
        let (below, above, weight) = Self::between(rows);
        for (point, share) in [(below, 1.0 - weight), (above, weight)] {
            if share == 0.0 {
                continue;
            }
            // Error of the line at `rows`, as far as this point makes it. A new point takes the most that it may be: as much with fewer rows,
            // in proportion with more. A batch of its size corrects it.
            self.micros[point] = Some(match (self.micros[point], self.at(rows)) {
                (Some(known), Some(line)) => (known + LEARNING_RATE * share * (seen - line)).max(0.0),
                (Some(known), None) => known + LEARNING_RATE * share * (seen - known),
                (None, _) => seen * (f64::from(POINTS[point]) / f64::from(rows)).max(1.0),
            });
            self.level(point);
        }
        self.fill();
    }

    /// Microseconds for a batch of so many rows; None before anything ran.
    pub fn predict(&self, rows: u32) -> Option<f64> {
        if rows == 0 {
            return Some(0.0);
        }
        let last = self.micros.iter().rposition(Option::is_some)?;
        let (below, above, weight) = Self::between(rows);
        let line = self.filled[below] * (1.0 - weight) + self.filled[above] * weight;
        let (most, is_known) = (POINTS[POINTS.len() - 1], last + 1 == POINTS.len());
        Some(if rows > most && !is_known { line * f64::from(rows) / f64::from(most) } else { line })
    }

    /// Whether batches of about so many rows have run.
    pub fn is_known(&self, rows: u32) -> bool {
        self.at(rows).is_some()
    }

    /// Microseconds of the smallest batch that is known.
    pub fn least(&self) -> Option<f64> {
        self.micros.iter().flatten().copied().next()
    }

    /// The most rows, up to `most`, that are predicted to take no more than `micros`; at least one.
    pub fn rows_within(&self, micros: f64, most: u32) -> u32 {
        largest(most, |rows| self.predict(rows).is_none_or(|predicted| predicted <= micros)).max(1)
    }

    /// Microseconds that are lost where so many rows, and so many `more`, run in two batches and not in one. Where no batch as large has run,
    /// one is taken to cost as little as it may, so that it is tried. Infinite before anything ran.
    pub fn apart(&self, rows: u32, more: u32) -> f64 {
        let (Some(one), Some(other)) = (self.predict(rows), self.predict(more)) else { return f64::INFINITY };
        let larger = one.max(other);
        let together = self.at(rows + more).map_or(larger, |known| known.max(larger));
        let lost = one + other - together;
        // What is learned from times is never exact: so little may be nothing.
        if lost > APART_LEAST * together { lost } else { 0.0 }
    }

    /// Value of the line at `rows` if both of its ends are known.
    fn at(&self, rows: u32) -> Option<f64> {
        let (below, above, weight) = Self::between(rows);
        let (low, high) = (self.micros[below], self.micros[above]);
        if weight == 0.0 { low } else { Some(low? * (1.0 - weight) + high? * weight) }
    }

    /// Points around `rows`, and how far it is from the lower to the upper one.
    fn between(rows: u32) -> (usize, usize, f64) {
        let above = POINTS.partition_point(|point| *point < rows).min(POINTS.len() - 1);
        if POINTS[above] <= rows {
            return (above, above, 0.0);
        }
        let below = above - 1;
        (below, above, f64::from(rows - POINTS[below]) / f64::from(POINTS[above] - POINTS[below]))
    }

    /// Fills in what lies between known points: a straight line, before the first as much as there, and beyond the last, where nothing as
    /// large has run, as much for each row: that is the worst.
    fn fill(&mut self) {
        let mut known: Option<(usize, f64)> = None;
        for point in 0..POINTS.len() {
            let Some(high) = self.micros[point] else {
                let (last, low) = known.unwrap_or_default();
                self.filled[point] = low * f64::from(POINTS[point]) / f64::from(POINTS[last]);
                continue;
            };
            let (from, low) = known.map_or((0, high), |(last, low)| (last, low));
            for between in from..point {
                let share = f64::from(POINTS[between] - POINTS[from]) / f64::from(POINTS[point] - POINTS[from]);
                self.filled[between] = low + (high - low) * share;
            }
            self.filled[point] = high;
            known = Some((point, high));
        }
    }

    /// Levels other points to one that has changed, so that the curve does not fall.
    fn level(&mut self, changed: usize) {
        let value = self.micros[changed];
        for (point, micros) in self.micros.iter_mut().enumerate() {
            if micros.is_some() && ((point < changed && *micros > value) || (point > changed && *micros < value)) {
                *micros = value;
            }
        }
    }
}

/// The largest number up to `most` for which `holds` does; it holds for 0, and for no number above one for which it does not.
pub(crate) fn largest(most: u32, holds: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_curve_learns_what_batches_cost() {
        let truth = |rows: u32| Duration::from_micros(1000 + 20 * u64::from(rows.saturating_sub(16)));
        let mut curve = CostCurve::default();
        assert_eq!(curve.predict(5), None);
        for round in 0..400u32 {
            let rows = 1 + round * 37 % 300;
            curve.observe(rows, truth(rows));
        }
        for rows in [1, 7, 16, 40, 100, 200, 300] {
            let (seen, said) = (truth(rows).as_secs_f64() * 1e6, curve.predict(rows).expect("learned"));
            assert!((said / seen - 1.0).abs() < 0.1, "{rows} rows: {said} for {seen}");
        }
        let within = curve.rows_within(2000.0, 300);
        assert!((58..=75).contains(&within), "{within} rows fit 2 ms, 66 in truth");
    }

    #[test]
    fn what_is_larger_than_all_that_ran_costs_as_much_for_each_row() {
        let curve = CostCurve::seeded(&[(8, Duration::from_micros(100))]);
        assert_eq!((curve.predict(4), curve.predict(8), curve.predict(80)), (Some(100.0), Some(100.0), Some(1000.0)));
    }

    proptest! {
        #[test]
        fn more_rows_never_cost_less(seen in proptest::collection::vec((1u32..5000, 0u64..100_000), 1..60)) {
            let mut curve = CostCurve::default();
            seen.iter().for_each(|(rows, micros)| curve.observe(*rows, Duration::from_micros(*micros)));
            let costs: Vec<f64> = (1..600).map(|i| curve.predict(i * 9).expect("something ran")).collect();
            prop_assert!(costs.is_sorted_by(|low, high| *low <= *high + 1e-6), "{:?}", costs);
        }
    }
}
