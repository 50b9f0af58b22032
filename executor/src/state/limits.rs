//! The named maxima of one engine, and how they relate.

use ashlar_kernels::ops::{KvFormat, PageLayout};
use serde::{Deserialize, Serialize};

use super::batch::SequenceId;

/// Bounds of one executor's engine. `check` asserts their relations at start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Tokens of one KV page; a multiple of 16.
    pub page_tokens: u32,
    /// Rows of one batch (prompt chunks and decodes together).
    pub step_tokens_max: u32,
    /// Rows of one sequence in one batch.
    pub chunk_tokens_max: u32,
    /// How keys and values are stored; part of the numeric class.
    pub kv_format: KvFormat,
    /// Milliseconds between two tokens of a sequence that are wanted, where its deployment does not say; prompts are computed in the slack. 0: no
    /// target, and prompts are bounded by `step_tokens_max` alone.
    pub gap_ms: u32,
    /// Milliseconds from admission to the first token that are wanted, where its deployment does not say; 0: no target.
    pub ttft_ms: u32,
    /// Milliseconds that one batch may be expected to take; chunks of prompts are cut to it. 0: any.
    pub batch_ms_max: u32,
    /// Milliseconds that a ready row lets others go first, at most.
    pub row_wait_ms: u32,
    /// Milliseconds that a ready row lets others go first, at most, so that siblings run its segment together with it, and never longer than
    /// a pass and a half; 0: rows do not wait for siblings, and the deepest segment goes first.
    pub regroup_wait_ms: u32,
    /// Segments that are alike and run abreast in one batch, at most; 1: none do.
    pub strands_max: u32,
    /// Batches handed to the device and not done. From 2 on the device finds the next one waiting whenever it ends one.
    pub batches_in_flight_max: u32,
    /// Sequences that hold pages at one time.
    pub sequences_max: u32,
    /// Sequences that wait.
    pub waiting_max: u32,
    /// Rows of hidden states kept between segments.
    pub hidden_rows_max: u32,
    /// Rows sent down a link and not yet consumed there, for one sequence.
    pub link_rows_max: u32,
    /// Bytes of KV pages.
    pub kv_bytes: u64,
    /// Bytes of KV pages, of those that are used first, for which an idle device has the system put memory there before they are needed.
    pub kv_touch_bytes: u64,
    /// Bytes of hidden rows that are kept where chains part, so that a prompt that one model has seen is computed from there on by another;
    /// 0: none. Of each width of hidden rows.
    pub boundary_bytes: u64,
    /// Whether full pages are kept for later sequences with equal lineage and tokens.
    pub prefix_cache: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            page_tokens: 16,
            kv_format: KvFormat::F32,
            step_tokens_max: 256,
            chunk_tokens_max: 256,
            gap_ms: 0,
            ttft_ms: 0,
            batch_ms_max: 0,
            row_wait_ms: 200,
            regroup_wait_ms: 200,
            strands_max: 64,
            batches_in_flight_max: 2,
            sequences_max: 64,
            waiting_max: 1024,
            hidden_rows_max: 1024,
            link_rows_max: 512,
            kv_bytes: 1 << 30,
            kv_touch_bytes: 0,
            boundary_bytes: 64 << 20,
            prefix_cache: true,
        }
    }
}

impl Limits {
    /// What KV pages are like.
    pub fn pages(&self) -> PageLayout {
        PageLayout { tokens: self.page_tokens as usize, format: self.kv_format }
    }

    /// Slots of hidden rows of a width that the device has: those that change hands between segments, then boundary pages.
    pub fn hidden_slots(&self, width: u32) -> usize {
        let page_bytes = super::pages::hidden_page_bytes(width, self.page_tokens);
        self.hidden_rows_max as usize + (self.boundary_bytes / page_bytes) as usize * self.page_tokens as usize
    }

    /// The numeric class of an executor whose device is of `device_class` with f32 KV: tokens differ between KV
    /// formats, so a sequence must not move from one to another (docs/numerics.md).
    pub fn numeric_class(&self, device_class: &str) -> String {
        match self.kv_format {
            KvFormat::F32 => device_class.to_owned(),
            format => format!("{device_class}+kv-{}", format.name()),
        }
    }

    /// The first relation that does not hold, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        let rules = [
            (self.page_tokens > 0 && self.page_tokens.is_multiple_of(16), "page_tokens must be a positive multiple of 16"),
            (self.page_tokens <= PAGE_TOKENS_MAX, "page_tokens must be at most 4096"),
            (self.step_tokens_max <= STEP_TOKENS_MAX, "step_tokens_max must be at most 65536"),
            (self.chunk_tokens_max >= 1, "chunk_tokens_max must be at least 1"),
            (self.chunk_tokens_max <= self.step_tokens_max, "chunk_tokens_max must not exceed step_tokens_max"),
            ((1..=STRANDS_MAX).contains(&self.strands_max), "strands_max must be 1 to 1024"),
            ((1..=BATCHES_IN_FLIGHT_MAX).contains(&self.batches_in_flight_max), "batches_in_flight_max must be 1 to 16"),
            (self.waiting_max >= 1, "waiting_max must be at least 1: a sequence waits until the next step is planned"),
            (self.sequences_max >= 1, "sequences_max must be at least 1"),
            (
                self.sequences_max <= self.step_tokens_max,
                "sequences_max must not exceed step_tokens_max, so that all decodes fit one batch",
            ),
            (
                (self.sequences_max as usize).saturating_add(self.waiting_max as usize) <= SequenceId::PLACES_MAX,
                "sequences_max and waiting_max must not exceed 1048576 together",
            ),
            (self.hidden_rows_max >= self.step_tokens_max.saturating_mul(2), "hidden_rows_max must be at least twice step_tokens_max"),
            (self.link_rows_max >= self.chunk_tokens_max, "link_rows_max must be at least chunk_tokens_max"),
            (self.kv_touch_bytes <= self.kv_bytes, "kv_touch_bytes must not exceed kv_bytes"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, sentence)) => Err((*sentence).to_owned()),
        }
    }
}

/// Longer pages only waste memory: a sequence's last one is half empty on average.
const PAGE_TOKENS_MAX: u32 = 4096;
/// A step beyond this holds everybody up for seconds, and its buffers alone take gigabytes.
const STEP_TOKENS_MAX: u32 = 1 << 16;
/// More than that many layers in one call gain nothing.
const STRANDS_MAX: u32 = 1024;
/// The device is busy with two; what is planned past an unknown end is computed in vain.
const BATCHES_IN_FLIGHT_MAX: u32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_hold_and_a_broken_relation_is_named() {
        assert_eq!(Limits::default().check(), Ok(()));
        let error = Limits { chunk_tokens_max: 500, ..Limits::default() }.check();
        assert_eq!(error, Err("chunk_tokens_max must not exceed step_tokens_max".to_owned()));
    }

    #[test]
    fn every_kv_format_is_a_numeric_class_of_its_own() {
        let classes = [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8]
            .map(|kv_format| Limits { kv_format, ..Limits::default() }.numeric_class("cpu-v1"));
        assert_eq!(classes, ["cpu-v1", "cpu-v1+kv-bf16", "cpu-v1+kv-int8"]);
        assert_eq!(Limits::default().numeric_class("cpu-v1+bf16-dot"), "cpu-v1+bf16-dot");
    }
}
