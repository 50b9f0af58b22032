//! What planning costs: 32 models over 64 segments, 4 segments a sequence. One pass advances each sequence by one token through all of its
//! segments. `cargo bench -p ashlar-executor --bench plan` prints a curve for each load: the time that the engine takes for a pass (plans,
//! and the results of batches), without a device. Goal: under 100 us of planning for 256 sequences that decode. `-- LOAD SEQUENCES PASSES`
//! runs one, for callgrind (`--toggle-collect='*Engine*poll_output*'`, likewise `handle_batch_done` and `handle_admit`).

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

/// Who is there while passes are counted.
struct Load {
    name: &'static str,
    /// Whether sequences end, and others come.
    is_coming_and_going: bool,
    /// Targets for gaps and for first tokens, in milliseconds; 0: none.
    gap_ms: u32,
    ttft_ms: u32,
    /// Tenants, and sequences known for each one that may run.
    tenants: u32,
    known: u32,
}

const LOADS: [Load; 4] = [
    Load { name: "decodes", is_coming_and_going: false, gap_ms: 0, ttft_ms: 0, tenants: 8, known: 1 },
    Load { name: "prompts", is_coming_and_going: true, gap_ms: 0, ttft_ms: 0, tenants: 8, known: 1 },
    Load { name: "targets", is_coming_and_going: true, gap_ms: 1000, ttft_ms: 5_000_000, tenants: 8, known: 1 },
    Load { name: "tenants", is_coming_and_going: true, gap_ms: 0, ttft_ms: 0, tenants: 1000, known: 2 },
];

/// Time of a pass: planning, and taking the results of its batches.
struct Cost {
    plan: Duration,
    results: Duration,
    batches: u64,
}

fn pass_cost(load: &Load, sequence_count: u32, passes: u32) -> Cost {
    let rows_max = sequence_count.max(256);
    let limits = Limits {
        sequences_max: sequence_count,
        waiting_max: 2 * sequence_count,
        gap_ms: load.gap_ms,
        ttft_ms: load.ttft_ms,
        step_tokens_max: rows_max,
        chunk_tokens_max: 64,
        hidden_rows_max: 4 * rows_max,
        kv_bytes: 64 << 30,
        ..Limits::default()
    };
    let mut engine = Engine::new(limits);
    let spans: Vec<_> = chains().iter().map(|chain| engine.handle_host(host(chain))).collect();
    let admit = |number: u32| {
        let (prompt_tokens, generated_tokens_max) =
            if load.is_coming_and_going { (40 + number % 80, 20 + number * 7 % 41) } else { (24, 1 << 20) };
        Admit {
            key: SequenceKey { router: RouterId("rtr_bench".to_owned()), number: number.into() },
            epoch: 0,
            span: spans[number as usize % spans.len()],
            prompt_tokens,
            tokens: (0..prompt_tokens).map(|t| number * 31 + t).collect(),
            generated_tokens_max,
            stop_tokens: Vec::new(),
            priority: 0,
            tenant: format!("ten_{}", number % load.tenants),
            weight: 1,
            targets: Targets::default(),
            domain: [7; 32],
        }
    };
    let mut number = sequence_count * load.known;
    (0..number).for_each(|number| engine.handle_admit(Duration::ZERO, admit(number)).map(|_| ()).expect("admitted"));
    let mut now = Duration::ZERO;
    let mut in_flight = std::collections::VecDeque::new();
    let mut cost = Cost { plan: Duration::ZERO, results: Duration::ZERO, batches: 0 };
    // Sequences reach page borders at different passes once they have run a while.
    let (warm_tokens, tokens) = (u64::from(sequence_count) * 20, u64::from(sequence_count) * u64::from(passes + 20));
    let mut done_tokens = 0;
    while done_tokens < tokens {
        let began = Instant::now();
        while let Some(output) = engine.poll_output(now) {
            match output {
                Output::RunBatch(batch) => in_flight.push_back(batch),
                Output::EmitFinished { .. } => {
                    engine.handle_admit(now, admit(number)).expect("admitted");
                    number += 1;
                }
                _ => {}
            }
        }
        let planned = began.elapsed();
        let batch = in_flight.pop_front().expect("somebody always runs");
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
        now += elapsed;
        engine.handle_batch_done(now, elapsed, samples);
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
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [name, sequences, passes] = &arguments[..] {
        let load = LOADS.iter().find(|load| load.name == name).expect("a load of LOADS");
        let number = |text: &str| text.parse().expect("a number");
        pass_cost(load, number(sequences), number(passes));
        return;
    }
    for load in &LOADS {
        println!("{}: sequences  batches  plan us  results us  plan ns for each row", load.name);
        for sequences in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096] {
            let passes = (200_000 / sequences).clamp(32, 800);
            // The best of several: others use this machine.
            let costs: Vec<Cost> = (0..5).map(|_| pass_cost(load, sequences, passes)).collect();
            let best = costs.iter().min_by_key(|cost| cost.plan).expect("five");
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            let row_ns = us(best.plan) * 1e3 / f64::from(sequences) / 4.0;
            println!("{sequences:18}  {:7}  {:7.1}  {:10.1}  {row_ns:8.1}", best.batches, us(best.plan), us(best.results));
        }
    }
}
