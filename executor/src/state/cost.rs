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
    /// Microseconds at each of `POINTS`; None where nothing like it has run or was profiled.
    micros: [Option<f64>; POINTS.len()],
    /// The same with those between filled in, so that nobody has to search; of no meaning while none is known.
    filled: [f64; POINTS.len()],
    /// Points that batches have taught. The others that are known are a profile's: good to reckon with, and not to learn from by difference.
    has_run: [bool; POINTS.len()],
}

impl CostCurve {
    /// A curve through measured points (rows, time), rows ascending from 1: straight lines between them. With fewer rows than the first it takes as
    /// long as that, with more than the last as long for each row. Nothing of it has run.
    pub fn seeded(profile: &[(u32, Duration)]) -> Self {
        let mut curve = Self::default();
        let (Some((first, _)), Some((last, longest))) = (profile.first(), profile.last()) else { return curve };
        let micros = |elapsed: &Duration| elapsed.as_secs_f64() * 1e6;
        let line = |rows: u32| {
            let above = profile.partition_point(|(measured, _)| *measured < rows);
            let (high, elapsed) = &profile[above];
            let (low, before) = if *high == rows { (high, elapsed) } else { (&profile[above - 1].0, &profile[above - 1].1) };
            let share = if high == low { 0.0 } else { f64::from(rows - low) / f64::from(high - low) };
            micros(before) * (1.0 - share) + micros(elapsed) * share
        };
        let mut most = 0f64;
        for (point, rows) in POINTS.into_iter().enumerate().filter(|(_, rows)| (*first..=*last).contains(rows)) {
            // A disturbed measurement of fewer rows may have taken longer.
            most = most.max(line(rows));
            curve.micros[point] = Some(most);
        }
        // What lies between two points counts at the one above, as the first batch of a size does.
        if let Some(point) = POINTS.iter().position(|rows| rows >= last)
            && curve.micros[point].is_none()
        {
            curve.micros[point] = Some(most.max(micros(longest)) * f64::from(POINTS[point]) / f64::from(*last));
        }
        curve.fill();
        curve
    }

    /// The curve of blocks that run one after another, as far as all of theirs reach; one that knows nothing if one of them has none.
    pub fn in_turn<'a>(blocks: impl IntoIterator<Item = Option<&'a Self>>) -> Self {
        let mut sum: Option<Self> = None;
        for block in blocks {
            let Some(block) = block else { return Self::default() };
            let before = sum.get_or_insert_with(|| Self { micros: [Some(0.0); POINTS.len()], ..Self::default() });
            before.micros = std::array::from_fn(|point| Some(before.micros[point]? + block.micros[point]?));
        }
        let mut sum = sum.unwrap_or_default();
        sum.fill();
        sum
    }

    /// Learns from a batch of `rows` that took `elapsed`.
    pub fn observe(&mut self, rows: u32, elapsed: Duration) {
        let seen = elapsed.as_secs_f64() * 1e6;
        let (below, above, weight) = Self::between(rows);
        let profiled = self.at(rows).filter(|line| *line > 0.0);
        for (point, share) in [(below, 1.0 - weight), (above, weight)] {
            if share == 0.0 {
                continue;
            }
            let is_first = !std::mem::replace(&mut self.has_run[point], true);
            // Error of the line at `rows`, as far as this point makes it. A new point takes the most that it may be: as much with fewer rows,
            // in proportion with more. A batch of its size corrects it.
            self.micros[point] = Some(match (profiled.filter(|_| is_first), self.micros[point], self.at(rows)) {
                // A profile says how much more a batch of the point's size takes, and what runs how long it takes.
                (Some(line), Some(known), _) => seen * known / line,
                (_, Some(known), Some(line)) => (known + LEARNING_RATE * share * (seen - line)).max(0.0),
                (_, Some(known), None) => known + LEARNING_RATE * share * (seen - known),
                (_, None, _) => seen * (f64::from(POINTS[point]) / f64::from(rows)).max(1.0),
            });
            self.level(point);
        }
        self.fill();
    }

    /// Microseconds for a batch of so many rows; None before anything ran, where there is no profile.
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
        let (below, above, weight) = Self::between(rows);
        self.has_run[above] && (weight == 0.0 || self.has_run[below])
    }

    /// Microseconds of the smallest batch that has run.
    pub fn least(&self) -> Option<f64> {
        std::iter::zip(&self.micros, self.has_run).find_map(|(micros, has_run)| micros.filter(|_| has_run))
    }

    /// The most rows, up to `most`, that are predicted to take no more than `micros`; at least one.
    pub fn rows_within(&self, micros: f64, most: u32) -> u32 {
        largest(most, |rows| self.predict(rows).is_none_or(|predicted| predicted <= micros)).max(1)
    }

    /// Microseconds that are lost where so many rows, and so many `more`, run in two batches and not in one. Where no batch as large has run,
    /// one is taken to cost as little as it may, so that it is tried. Infinite before anything ran: a profile leaves out what a batch costs for its own
    /// sake, and so is no measure of one batch more or less.
    pub fn apart(&self, rows: u32, more: u32) -> f64 {
        let (true, Some(one), Some(other)) = (self.has_run.contains(&true), self.predict(rows), self.predict(more)) else {
            return f64::INFINITY;
        };
        let larger = one.max(other);
        let together = self.at(rows + more).filter(|_| self.is_known(rows + more)).map_or(larger, |known| known.max(larger));
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
        let mut curve = CostCurve::default();
        curve.observe(8, Duration::from_micros(100));
        assert_eq!(curve.predict(80), CostCurve::seeded(&[(8, Duration::from_micros(100))]).predict(80));
        assert_eq!((curve.predict(4), curve.predict(8), curve.predict(80)), (Some(100.0), Some(100.0), Some(1000.0)));
    }

    /// A block that reads its weights for so long and takes so long for each row.
    fn block(read: u64, row: u64, rows: &[u32]) -> CostCurve {
        let profile: Vec<_> = rows.iter().map(|rows| (*rows, Duration::from_micros(read + row * u64::from(*rows)))).collect();
        CostCurve::seeded(&profile)
    }

    #[test]
    fn a_segment_that_has_not_run_takes_what_its_blocks_take_one_after_another() {
        let rows = [1, 2, 4, 8, 16, 32, 64, 128, 256];
        let (small, large) = (block(10, 1, &rows), block(100, 3, &rows));
        let sum = CostCurve::in_turn([Some(&small), Some(&large), Some(&large)]);
        for rows in [1, 3, 8, 17, 70, 100, 200, 256] {
            let (said, truth) = (sum.predict(rows).expect("profiled"), f64::from(210 + 7 * rows));
            assert!((said - truth).abs() < 1e-6, "{rows} rows: {said} for {truth}");
        }
        assert_eq!(sum.predict(512), Some(2.0 * f64::from(210 + 7 * 256)), "beyond, as much for each row");
        assert_eq!(CostCurve::in_turn([Some(&small), None]), CostCurve::default(), "one that has none is no profile of all");
        assert_eq!(CostCurve::in_turn([]), CostCurve::default());
        assert_eq!(sum.apart(4, 4), f64::INFINITY, "what meeting saves is learned from batches");
    }

    #[test]
    fn what_was_profiled_has_not_run_and_is_corrected_by_what_runs() {
        let mut curve = block(100, 1, &[1, 8, 64]);
        assert!((1..=64).all(|rows| !curve.is_known(rows)) && curve.least().is_none());
        curve.observe(8, Duration::from_micros(208));
        assert!(curve.is_known(8) && !curve.is_known(4) && curve.least() == curve.predict(8));
        assert_eq!(curve.apart(8, 8), curve.predict(8).expect("it ran"), "sixteen have not run, and are tried");
        for _ in 0..40 {
            curve.observe(8, Duration::from_micros(208));
        }
        assert!(curve.predict(8).is_some_and(|said| (said - 208.0).abs() < 1.0), "{curve:?}");
        assert!(curve.predict(1).is_some_and(|said| (said - 101.0).abs() < 1e-6), "others are as they were: {curve:?}");
        assert_eq!(curve.predict(64), curve.predict(8), "and none costs less with more rows");
    }

    #[test]
    fn rows_between_two_points_count_at_the_one_above() {
        let curve = block(100, 0, &[50]);
        assert_eq!((curve.predict(64), curve.predict(1)), (Some(128.0), Some(128.0)));
        let disturbed =
            CostCurve::seeded(&[(1, Duration::from_micros(90)), (2, Duration::from_micros(70)), (4, Duration::from_micros(95))]);
        assert_eq!([1, 2, 4].map(|rows| disturbed.predict(rows)), [Some(90.0), Some(90.0), Some(95.0)]);
    }

    proptest! {
        /// Where a profile is true, what runs changes nothing of it, and all that had to be tried is known.
        #[test]
        fn a_true_profile_stays(seen in proptest::collection::vec(1u32..=256, 1..60), read in 1u64..5000, row in 0u64..50) {
            let seeded = block(read, row, &[1, 2, 4, 8, 16, 32, 64, 128, 256]);
            let mut curve = seeded.clone();
            seen.iter().for_each(|rows| curve.observe(*rows, Duration::from_micros(read + row * u64::from(*rows))));
            for rows in 1..=300 {
                let (before, after) = (seeded.predict(rows).expect("profiled"), curve.predict(rows).expect("profiled"));
                prop_assert!((before - after).abs() < 1e-6 * before, "{} rows: {} and {}", rows, before, after);
            }
        }

        #[test]
        fn more_rows_never_cost_less_than_a_profile_and_batches_say(
            profile in proptest::collection::btree_map(1u32..=4096, 1u64..100_000, 0..20),
            seen in proptest::collection::vec((1u32..5000, 0u64..100_000), 1..60),
        ) {
            let profile: Vec<_> = profile.into_iter().map(|(rows, micros)| (rows, Duration::from_micros(micros))).collect();
            let mut curve = CostCurve::seeded(&profile);
            prop_assert_eq!(curve.predict(1).is_some(), !profile.is_empty());
            for (rows, micros) in &seen {
                curve.observe(*rows, Duration::from_micros(*micros));
                let costs: Vec<f64> = (1..60).map(|i| curve.predict(i * 90).expect("something ran")).collect();
                prop_assert!(costs.is_sorted_by(|low, high| *low <= *high + 1e-6), "{:?}", costs);
            }
        }

        #[test]
        fn more_rows_never_cost_less(seen in proptest::collection::vec((1u32..5000, 0u64..100_000), 1..60)) {
            let mut curve = CostCurve::default();
            seen.iter().for_each(|(rows, micros)| curve.observe(*rows, Duration::from_micros(*micros)));
            let costs: Vec<f64> = (1..600).map(|i| curve.predict(i * 9).expect("something ran")).collect();
            prop_assert!(costs.is_sorted_by(|low, high| *low <= *high + 1e-6), "{:?}", costs);
        }
    }
}
