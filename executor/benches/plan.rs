//! What planning costs: 32 models over 64 segments, 4 segments a sequence, all sequences decoding. One pass advances each sequence by
//! one token through all of its segments. `cargo bench -p ashlar-executor --bench plan` prints the curve: the time that the engine takes
//! for a pass (plans, and the results of batches), without a device. Goal: under 100 us of planning for 256 sequences.

#![expect(clippy::disallowed_methods, reason = "a benchmark measures time")]

use std::time::{Duration, Instant};

use ashlar_executor::state::batch::{RowOutput, Sample, SampledToken};
use ashlar_executor::state::engine::{Engine, HostSpan, Output};
use ashlar_executor::state::limits::Limits;
use ashlar_executor::state::segments::BlockIndex;
use ashlar_executor::state::sequence::Admit;
use ashlar_executor::state::targets::Targets;
use ashlar_kernels::ops::{KvFormat, KvShape};
use ashlar_wire::id::{RouterId, SequenceKey};

/// Chains of four families: a shared start, four second quarters, eight third ones, three ends where models meet again.
fn chains() -> Vec<Vec<u32>> {
    let model = |m: u32| {
        let (family, of) = (m / 8, m % 8);
        let parts = [(0, 0), (1, of / 2), (2, of), (3, of % 3)];
        let part = |(level, number): (u32, u32)| (0..4).map(move |block| ((family * 4 + level) * 8 + number) * 4 + block);
        parts.into_iter().flat_map(part).collect()
    };
    (0..32).map(model).collect()
}

/// A span of a chain whose second block of every two is an attention block.
fn host(blocks: &[u32]) -> HostSpan {
    let shape = KvShape { kv_heads: 1, head_dim: 64, page_tokens: 16, format: KvFormat::Bf16 };
    let mut lineage = [0; 32];
    let lineages = blocks.iter().map(|block| {
        lineage = *blake3::Hasher::new_keyed(&lineage).update(&block.to_le_bytes()).finalize().as_bytes();
        lineage
    });
    HostSpan {
        lineages: lineages.collect(),
        blocks: blocks.iter().map(|block| BlockIndex(*block)).collect(),
        kv_shapes: (0..blocks.len()).map(|i| (i % 2 == 1).then_some(shape)).collect(),
        windows: vec![None; blocks.len()],
        width: 64,
        begins_with_embed: true,
        ends_with_head: true,
    }
}

/// Time of a pass: planning, and taking the results of its batches.
struct Cost {
    plan: Duration,
    results: Duration,
    batches: u64,
}

fn pass_cost(sequence_count: u32, passes: u32) -> Cost {
    let rows_max = sequence_count.max(256);
    let limits = Limits {
        sequences_max: sequence_count,
        waiting_max: sequence_count,
        step_tokens_max: rows_max,
        chunk_tokens_max: 64,
        hidden_rows_max: 4 * rows_max,
        kv_bytes: 64 << 30,
        ..Limits::default()
    };
    let mut engine = Engine::new(limits);
    let spans: Vec<_> = chains().iter().map(|chain| engine.handle_host(host(chain))).collect();
    for number in 0..sequence_count {
        let tokens: Vec<u32> = (0..24).map(|t| number * 31 + t).collect();
        let admit = Admit {
            key: SequenceKey { router: RouterId("rtr_bench".to_owned()), number: number.into() },
            epoch: 0,
            span: spans[number as usize % spans.len()],
            prompt_tokens: tokens.len() as u32,
            tokens,
            generated_tokens_max: 1 << 20,
            stop_tokens: Vec::new(),
            priority: 0,
            tenant: format!("ten_{}", number % 8),
            weight: 1,
            targets: Targets::default(),
            domain: [7; 32],
        };
        engine.handle_admit(Duration::ZERO, admit).expect("admitted");
    }
    let mut in_flight = std::collections::VecDeque::new();
    let mut cost = Cost { plan: Duration::ZERO, results: Duration::ZERO, batches: 0 };
    // Sequences reach page borders at different passes once they have run a while.
    let (warm_tokens, tokens) = (u64::from(sequence_count) * 20, u64::from(sequence_count) * u64::from(passes + 20));
    let mut done_tokens = 0;
    while done_tokens < tokens {
        let began = Instant::now();
        while let Some(output) = engine.poll_output(Duration::ZERO) {
            if let Output::RunBatch(batch) = output {
                in_flight.push_back(batch);
            }
        }
        let planned = began.elapsed();
        let batch = in_flight.pop_front().expect("decodes never end");
        let samples: Vec<Sample> = (batch.rows.iter())
            .filter_map(|rows| match rows.output {
                RowOutput::Sample(Some(position)) => Some(Sample {
                    sequence: rows.sequence,
                    position,
                    token: Ok(SampledToken { token: position % 1000, logprob: 0.0, top: Vec::new() }),
                }),
                _ => None,
            })
            .collect();
        done_tokens += samples.len() as u64;
        let began = Instant::now();
        // As a device of weights takes: for each block what it reads, and something for each row.
        let elapsed = Duration::from_micros(30 + batch.blocks.len() as u64 * (40 + 4 * u64::from(batch.row_count)));
        engine.handle_batch_done(Duration::ZERO, elapsed, samples);
        engine.recycle(batch);
        let taken = began.elapsed();
        if done_tokens > warm_tokens {
            cost.plan += planned;
            cost.results += taken;
            cost.batches += 1;
        }
    }
    engine.check_integrity().expect("integrity");
    Cost { plan: cost.plan / passes, results: cost.results / passes, batches: cost.batches / u64::from(passes) }
}

fn main() {
    println!("sequences  batches  plan us  results us  plan ns for each row");
    for sequences in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096] {
        let passes = (200_000 / sequences).clamp(32, 800);
        // The best of several: others use this machine.
        let costs: Vec<Cost> = (0..5).map(|_| pass_cost(sequences, passes)).collect();
        let best = costs.iter().min_by_key(|cost| cost.plan).expect("five");
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let row_ns = us(best.plan) * 1e3 / f64::from(sequences) / 4.0;
        println!("{sequences:9}  {:7}  {:7.1}  {:10.1}  {row_ns:8.1}", best.batches, us(best.plan), us(best.results));
    }
}
