//! What one block costs on a device by rows, apart from its chain: the times that `ashlar zoo profile` keeps (docs/profile.md). Each run finds what it would
//! in a chain: the code and the hidden rows at hand, its weights and pages not. It does not know the zoo.

use std::sync::Arc;
use std::time::Instant;

use ashlar_kernels::ops::{KvFormat, Ops, PackError};
use ashlar_zoo::profiles::Point;

use super::alone::AloneLimits;
use super::block::LoadedBlock;
use super::steps::{Steps, noise};

/// Rows that blocks are profiled at, unless others are asked for.
pub const ROWS: [u32; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Sequences of a batch, at most: more rows are several of each, as those of prompts are.
pub const SEQUENCES_MAX: u32 = 32;
/// Tokens that each sequence has before the batch.
pub const CONTEXT_TOKENS: u32 = 256;
/// Tokens of a KV page, as the executor has by default.
const PAGE_TOKENS: usize = 32;
/// Runs of which the median counts.
const RUNS: u32 = 7;
/// Elements of each of the two buffers that are read before each run, 64 MiB together: more than the caches of a core, and than its part of a last one that
/// many share.
const FLUSH_ELEMENTS: usize = 8 << 20;

/// Why a block could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The device has no room for the batches, or for what the caches are filled with.
    #[error("make room for {rows} rows")]
    Room {
        /// Rows of the largest batch.
        rows: u32,
        /// Why.
        #[source]
        source: PackError,
    },
    /// A learned table of positions is shorter than what one sequence would have in the batch.
    #[error("it knows {positions} positions, and a sequence has {rows} rows in a batch")]
    Positions {
        /// Rows of the table.
        positions: usize,
        /// Rows of one sequence.
        rows: u32,
    },
}

/// Whether a batch can have so many rows: each sequence has as many.
pub fn can_measure(rows: u32) -> bool {
    rows > 0 && (rows <= SEQUENCES_MAX || rows.is_multiple_of(SEQUENCES_MAX))
}

/// What fills the caches between runs, on one device.
pub struct Profiler<B: Ops> {
    ops: Arc<B>,
    flush: [B::Buffer; 2],
}

impl<B: Ops> Profiler<B> {
    /// Makes room for what the caches are filled with.
    ///
    /// # Errors
    /// When the device has none.
    pub fn new(ops: Arc<B>) -> Result<Self, PackError> {
        let (sum, mut added) = (ops.buffer(FLUSH_ELEMENTS)?, ops.buffer(FLUSH_ELEMENTS)?);
        // What nobody has written may be one page of zeros.
        ops.upload(&mut added, 0, &vec![1e-3; FLUSH_ELEMENTS]);
        Ok(Self { ops, flush: [sum, added] })
    }

    /// Times of a block by `rows`, for each of which [`can_measure`] holds. The block is given twice, as two copies in memory: between two runs of the
    /// one that is measured caches are filled with other things, and the other one brings the code back. Keeps the device busy.
    ///
    /// # Errors
    /// When the device has no room, or the block knows too few positions.
    ///
    /// # Panics
    /// When there are no rows, or a batch cannot have as many.
    pub fn measure(&mut self, twins: [LoadedBlock<B>; 2], rows: &[u32], kv_format: KvFormat) -> Result<Vec<Point>, ProfileError> {
        assert!(!rows.is_empty() && rows.iter().all(|rows| can_measure(*rows)), "rows are checked where they are read: {rows:?}");
        let most = *rows.iter().max().expect("there are some");
        let each_most = most.div_ceil(SEQUENCES_MAX);
        // Only attention sees what came before.
        let block = &twins[1];
        let positions = block.position_count().unwrap_or(usize::MAX);
        if positions < each_most as usize {
            return Err(ProfileError::Positions { positions, rows: each_most });
        }
        let context = (CONTEXT_TOKENS as usize).min(positions - each_most as usize);
        let limits =
            AloneLimits { chunk_tokens_max: most as usize, tokens_max: context + each_most as usize, page_tokens: PAGE_TOKENS, kv_format };
        let hidden = if block.is_embed() { Vec::new() } else { noise(most as usize * block.width()) };
        let width = block.width();
        let room = |source| ProfileError::Room { rows: most, source };
        let mut steps = Steps::new(Arc::clone(&self.ops), twins.into(), limits, most.min(SEQUENCES_MAX) as usize).map_err(room)?;
        steps.fill_pages().map_err(room)?;
        let mut points = Vec::with_capacity(rows.len());
        for rows in rows.iter().copied() {
            let sequences = rows.min(SEQUENCES_MAX);
            let mut micros = [0.0; RUNS as usize];
            let mut step = || {
                let [sum, added] = &mut self.flush;
                self.ops.add(sum, added, FLUSH_ELEMENTS);
                let (hidden, each) = (&hidden[..hidden.len().min(rows as usize * width)], (rows / sequences) as usize);
                steps.take_hidden(hidden);
                steps.step_within(0..1, sequences as usize, context, each);
                steps.take_hidden(hidden);
                #[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
                let began = Instant::now();
                steps.step_within(1..2, sequences as usize, context, each);
                began.elapsed().as_secs_f64() * 1e6
            };
            // The first one touches memory that no later one does.
            step();
            micros.iter_mut().for_each(|micros| *micros = step());
            micros.sort_unstable_by(f64::total_cmp);
            points.push(Point { rows, micros: micros[micros.len() / 2], runs: RUNS });
        }
        Ok(points)
    }
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::cpu::{Cpu, CpuOptions};

    use super::super::testing::Memory;
    use super::*;

    #[test]
    fn blocks_of_every_kind_are_measured_apart() {
        let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
        let mut profiler = Profiler::new(Arc::clone(&ops)).unwrap();
        let mut measured = 0;
        let chain = || Memory::default().chain(&*ops);
        for (block, twin) in std::iter::zip(chain(), chain()) {
            let points = profiler.measure([block, twin], &[1, 3, 64], KvFormat::Bf16).unwrap();
            assert_eq!(points.iter().map(|point| (point.rows, point.runs)).collect::<Vec<_>>(), [(1, RUNS), (3, RUNS), (64, RUNS)]);
            assert!(points.iter().all(|point| point.micros > 0.0 && point.micros.is_finite()), "{points:?}");
            measured += 1;
        }
        assert_eq!(measured, 6);
    }

    #[test]
    fn rows_are_as_many_of_each_sequence() {
        let measurable = |rows: &[u32]| rows.iter().all(|rows| can_measure(*rows));
        assert!(measurable(&ROWS) && measurable(&[3, 31, 96, 4096]));
        assert!([0, 33, 100, 250].iter().all(|rows| !can_measure(*rows)));
    }
}
