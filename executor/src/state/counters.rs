//! What the engine counts. Exact numbers, no clocks; `io` copies them into Prometheus.

/// Monotonic counts since start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Batches planned.
    pub batch_count: u64,
    /// Rows computed, summed over segments.
    pub row_count: u64,
    /// Prompt tokens looked up in the prefix index.
    pub prefix_query_tokens: u64,
    /// Prompt tokens whose compute was avoided; a token that skips half of its chain's blocks counts half.
    pub prefix_hit_tokens: u64,
    /// Of these, thanks to what another model computed.
    pub cross_model_hit_tokens: u64,
    /// Sequences that lost their pages to others.
    pub preemption_count: u64,
    /// Tokens emitted.
    pub generated_tokens: u64,
    /// Rows planned for tokens after a stop token, which nobody knew then.
    pub discarded_rows: u64,
    /// Cached pages dropped to make room.
    pub evicted_pages: u64,
    /// Sequences admitted with a target for the gaps between their tokens, and with one for the first.
    pub gap_target_count: u64,
    /// See `gap_target_count`.
    pub ttft_target_count: u64,
}

/// A picture of the present.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Sequences with pages.
    pub running_count: usize,
    /// Sequences without.
    pub waiting_count: usize,
    /// Pages that a sequence holds.
    pub used_pages: u64,
    /// Pages kept only for reuse.
    pub cached_pages: u64,
    /// Pages never used or given back.
    pub free_pages: u64,
    /// Pages of hidden rows kept where chains part.
    pub boundary_pages: u64,
    /// Distinct blocks hosted.
    pub block_count: usize,
    /// Blocks that more than one hosted span runs through.
    pub shared_block_count: usize,
    /// The least gap between tokens, in microseconds, that a sequence that decodes wants; 0: none.
    pub gap_target_us: u64,
}
