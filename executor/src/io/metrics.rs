//! The executor's Prometheus metrics (names: ARCHITECTURE.md). Counters are copied from the engine, not counted twice.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::state::batch::Batch;
use crate::state::counters::{Counters, Gauges};
use crate::state::segments::SegmentIndex;

/// Segments with metrics of their own; the others share a label.
const SEGMENT_LABELS_MAX: u32 = 128;
/// Label of the others.
const OTHER_SEGMENTS: &str = "other";

/// Handles to the executor's metrics.
#[derive(Debug, Clone)]
pub struct ExecutorMetrics {
    running: IntGauge,
    waiting: IntGauge,
    kv_pages: IntGaugeVec,
    prefix_query_tokens: IntCounter,
    prefix_hit_tokens: IntCounter,
    cross_model_hit_tokens: IntCounter,
    boundary_pages: IntGauge,
    preemptions: IntCounter,
    blocks_resident: IntGauge,
    blocks_shared: IntGauge,
    batch_tokens: Histogram,
    batch_sequences: Histogram,
    batch_models: Histogram,
    batch_strands: Histogram,
    segment_batches: IntCounterVec,
    segment_rows: IntCounterVec,
    segment_models: IntCounterVec,
    discarded_rows: IntCounter,
    targeted_sequences: IntCounterVec,
    gap_target_ms: IntGauge,
    /// Time in the queue of each sequence.
    pub queue_seconds: Histogram,
    /// Time of each step on the device.
    pub step_seconds: Histogram,
    /// Distinct adapters on the device.
    pub adapters_resident: IntGauge,
    /// Bytes of resident weights, adapters included.
    pub weight_bytes: IntGauge,
    /// Bytes that KV pages may take.
    pub kv_bytes: IntGauge,
    /// The newest plan obeyed.
    pub plan_generation: IntGauge,
    vllm_running: IntGauge,
    vllm_waiting: IntGauge,
    vllm_kv_usage: prometheus::Gauge,
    vllm_gpu_usage: prometheus::Gauge,
    vllm_prefix_queries: IntCounter,
    vllm_prefix_hits: IntCounter,
    vllm_queue_seconds: Histogram,
}

impl ExecutorMetrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// When a name is taken in `registry`.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let float_gauge = |name: &str, help: &str| -> Result<prometheus::Gauge, prometheus::Error> {
            let gauge = prometheus::Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| -> Result<Histogram, prometheus::Error> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let counts = || prometheus::exponential_buckets(1.0, 2.0, 12).expect("the arguments are in range");
        let seconds = || prometheus::exponential_buckets(0.0005, 2.0, 18).expect("the arguments are in range");
        let kv_pages = IntGaugeVec::new(Opts::new("ashlar_kv_pages", "KV pages by state."), &["state"])?;
        registry.register(Box::new(kv_pages.clone()))?;
        let by_segment = |name: &str, help: &str| -> Result<IntCounterVec, prometheus::Error> {
            let counter = IntCounterVec::new(Opts::new(name, help), &["segment"])?;
            registry.register(Box::new(counter.clone()))?;
            // So that the name is there before the first batch.
            counter.with_label_values(&[OTHER_SEGMENTS]);
            Ok(counter)
        };
        let opts =
            Opts::new("ashlar_targeted_sequences_total", "Sequences admitted with a target for the gaps between tokens, or for the first.");
        let targeted_sequences = IntCounterVec::new(opts, &["target"])?;
        registry.register(Box::new(targeted_sequences.clone()))?;
        Ok(Self {
            running: gauge("ashlar_sequences_running", "Sequences that hold KV pages.")?,
            waiting: gauge("ashlar_sequences_waiting", "Sequences that wait for pages.")?,
            kv_pages,
            prefix_query_tokens: counter("ashlar_prefix_query_tokens_total", "Prompt tokens looked up in the prefix cache.")?,
            prefix_hit_tokens: counter("ashlar_prefix_hit_tokens_total", "Prompt tokens whose compute was avoided.")?,
            cross_model_hit_tokens: counter(
                "ashlar_prefix_cross_model_hit_tokens_total",
                "Of the prompt tokens whose compute was avoided those that another model had computed.",
            )?,
            boundary_pages: gauge("ashlar_boundary_pages", "Pages of hidden states kept where chains part.")?,
            preemptions: counter("ashlar_preemptions_total", "Sequences that lost their pages to others.")?,
            blocks_resident: gauge("ashlar_blocks_resident", "Distinct blocks on the device.")?,
            blocks_shared: gauge("ashlar_blocks_shared", "Blocks that more than one hosted model runs through.")?,
            batch_tokens: histogram("ashlar_batch_tokens", "Rows of a batch.", counts())?,
            batch_sequences: histogram("ashlar_batch_sequences", "Sequences of a batch.", counts())?,
            batch_models: histogram("ashlar_batch_models", "Models that a batch had rows of.", counts())?,
            batch_strands: histogram("ashlar_batch_strands", "Segments that ran abreast in a batch.", counts())?,
            segment_batches: by_segment("ashlar_segment_batches_total", "Batches of a segment of the executor's present cut.")?,
            segment_rows: by_segment("ashlar_segment_rows_total", "Rows of these batches.")?,
            segment_models: by_segment("ashlar_segment_models_total", "Models that met in these batches, summed over batches.")?,
            discarded_rows: counter("ashlar_discarded_rows_total", "Rows computed after a stop token that was not known yet.")?,
            targeted_sequences,
            gap_target_ms: gauge("ashlar_gap_target_ms", "The least gap between tokens that a sequence that decodes wants; 0: none.")?,
            queue_seconds: histogram("ashlar_queue_seconds", "Time from admission to the first chunk.", seconds())?,
            step_seconds: histogram("ashlar_step_seconds", "Time of a step on the device.", seconds())?,
            adapters_resident: gauge("ashlar_adapters_resident", "Distinct adapters on the device, each on its block.")?,
            weight_bytes: gauge("ashlar_weight_bytes", "Bytes of resident weights, adapters included.")?,
            kv_bytes: gauge("ashlar_kv_bytes", "Bytes that KV pages may take.")?,
            plan_generation: gauge("ashlar_plan_generation", "The newest plan that the executor obeys.")?,
            vllm_running: gauge("vllm:num_requests_running", "Alias of ashlar_sequences_running.")?,
            vllm_waiting: gauge("vllm:num_requests_waiting", "Alias of ashlar_sequences_waiting.")?,
            vllm_kv_usage: float_gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use; 1 is all.")?,
            vllm_gpu_usage: float_gauge("vllm:gpu_cache_usage_perc", "Share of KV pages in use; 1 is all.")?,
            vllm_prefix_queries: counter("vllm:prefix_cache_queries", "Alias of ashlar_prefix_query_tokens_total.")?,
            vllm_prefix_hits: counter("vllm:prefix_cache_hits", "Alias of ashlar_prefix_hit_tokens_total.")?,
            vllm_queue_seconds: histogram("vllm:request_queue_time_seconds", "Alias of ashlar_queue_seconds.", seconds())?,
        })
    }

    /// Counts a batch that is handed to the device.
    pub fn batch(&self, batch: &Batch) {
        self.batch_tokens.observe(f64::from(batch.row_count));
        self.batch_sequences.observe(batch.rows.len() as f64);
        self.batch_models.observe(batch.span_count as f64);
        self.batch_strands.observe(batch.strands.len() as f64);
        for strand in &batch.strands {
            for SegmentIndex(number) in batch.segments_of(strand) {
                let name = if *number < SEGMENT_LABELS_MAX { number.to_string() } else { OTHER_SEGMENTS.to_owned() };
                self.segment_batches.with_label_values(&[&name]).inc();
                self.segment_rows.with_label_values(&[&name]).inc_by(strand.row_count.into());
                self.segment_models.with_label_values(&[&name]).inc_by(strand.span_count as u64);
            }
        }
    }

    /// Counts a sequence's time in the queue.
    pub fn queued(&self, seconds: f64) {
        self.queue_seconds.observe(seconds);
        self.vllm_queue_seconds.observe(seconds);
    }

    /// Copies the engine's numbers.
    pub fn publish(&self, gauges: &Gauges, counters: &Counters) {
        let as_i64 = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.running.set(gauges.running_count as i64);
        self.waiting.set(gauges.waiting_count as i64);
        self.vllm_running.set(gauges.running_count as i64);
        self.vllm_waiting.set(gauges.waiting_count as i64);
        for (state, count) in [("used", gauges.used_pages), ("cached", gauges.cached_pages), ("free", gauges.free_pages)] {
            self.kv_pages.with_label_values(&[state]).set(as_i64(count));
        }
        let all = gauges.used_pages + gauges.cached_pages + gauges.free_pages;
        let usage = if all == 0 { 0.0 } else { gauges.used_pages as f64 / all as f64 };
        self.vllm_kv_usage.set(usage);
        self.vllm_gpu_usage.set(usage);
        self.boundary_pages.set(as_i64(gauges.boundary_pages));
        self.blocks_resident.set(gauges.block_count as i64);
        self.blocks_shared.set(gauges.shared_block_count as i64);
        self.gap_target_ms.set(as_i64(gauges.gap_target_us / 1000));
        for (target, total) in [("gap", counters.gap_target_count), ("ttft", counters.ttft_target_count)] {
            let metric = self.targeted_sequences.with_label_values(&[target]);
            metric.inc_by(total.saturating_sub(metric.get()));
        }
        for (metric, total) in [
            (&self.prefix_query_tokens, counters.prefix_query_tokens),
            (&self.prefix_hit_tokens, counters.prefix_hit_tokens),
            (&self.cross_model_hit_tokens, counters.cross_model_hit_tokens),
            (&self.preemptions, counters.preemption_count),
            (&self.discarded_rows, counters.discarded_rows),
            (&self.vllm_prefix_queries, counters.prefix_query_tokens),
            (&self.vllm_prefix_hits, counters.prefix_hit_tokens),
        ] {
            metric.inc_by(total.saturating_sub(metric.get()));
        }
    }
}
