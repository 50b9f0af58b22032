//! What planning costs: 32 models over 64 segments, 4 segments a sequence. One pass advances each sequence by one token through all of its
//! segments. `cargo bench -p ashlar-executor --bench plan` prints a curve for each load: the time that the engine takes for a pass (plans,
//! and the results of batches), without a device. Goal: under 100 us of planning for 256 sequences that decode. `-- LOAD SEQUENCES PASSES`
//! runs one, for callgrind: `scripts/planning-cost.sh` counts the instructions of the functions `counted_*`.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures time")]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ashlar_executor::state::batch::{Batch, RowOutput, Sample, SampledToken, Strand};
use ashlar_executor::state::engine::{Engine, HostSpan, Output};
use ashlar_executor::state::limits::Limits;
use ashlar_executor::state::segments::BlockIndex;
use ashlar_executor::state::sequence::{Admit, SpanIndex};
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

const SHAPE: KvShape = KvShape { kv_heads: 1, head_dim: 64, page_tokens: 16, format: KvFormat::Bf16 };

/// A span of a chain whose second block of every two is an attention block.
fn host(blocks: &[u32], are_alike: bool) -> HostSpan {
    let mut lineage = [0; 32];
    let lineages = blocks.iter().map(|block| {
        lineage = *blake3::Hasher::new_keyed(&lineage).update(&block.to_le_bytes()).finalize().as_bytes();
        lineage
    });
    HostSpan {
        lineages: lineages.collect(),
        blocks: blocks.iter().map(|block| BlockIndex(*block)).collect(),
        kv_shapes: (0..blocks.len()).map(|i| (i % 2 == 1).then_some(SHAPE)).collect(),
        windows: vec![None; blocks.len()],
        forms: if are_alike { vec![0; blocks.len()] } else { blocks.to_vec() },
        widths: vec![64; blocks.len() + 1],
        costs: vec![None; blocks.len()],
        begins_with_embed: true,
        ends_with_head: true,
    }
}

/// Who is there while passes are counted.
#[derive(Clone, Copy)]
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
    /// Whether three more tenants have three quarters of what is known, in sequences that never end, and take each place that becomes free:
    /// whoever comes next claims it back.
    floods: bool,
    /// KV pages for each sequence that may run, over all of its attention blocks; 0: plenty. One that comes and goes needs 64 on average.
    pages: u64,
    /// Whether segments may run abreast.
    are_alike: bool,
}

const DECODES: Load = Load {
    name: "decodes",
    is_coming_and_going: false,
    gap_ms: 0,
    ttft_ms: 0,
    tenants: 8,
    known: 1,
    floods: false,
    pages: 0,
    are_alike: false,
};
const PROMPTS: Load = Load { name: "prompts", is_coming_and_going: true, ..DECODES };

const LOADS: [Load; 8] = [
    DECODES,
    PROMPTS,
    Load { name: "targets", gap_ms: 1000, ttft_ms: 5_000_000, ..PROMPTS },
    Load { name: "tenants", tenants: 1000, known: 2, ..PROMPTS },
    Load { name: "claims", tenants: 1000, known: 2, floods: true, ..PROMPTS },
    Load { name: "pages", known: 2, pages: 40, ..PROMPTS },
    Load { name: "shares", tenants: 1000, known: 2, pages: 40, ..PROMPTS },
    Load { name: "abreast", are_alike: true, ..DECODES },
];

/// Number of the first sequence that comes after the start.
const FIRST_NUMBER: u32 = 1 << 20;

/// Batches after which another sequence comes for one that ended, where a load floods.
const PAUSE_BATCHES: u64 = 8;

/// Time of a pass: planning, and taking the results of its batches.
struct Cost {
    plan: Duration,
    results: Duration,
    batches: u64,
    /// Sequences that gave way, in a thousand passes.
    gave_way: u64,
}

// What callgrind counts, once all is warm. The rest of a benchmark calls the engine by itself.

#[inline(never)]
fn counted_admit(engine: &mut Engine, now: Duration, admit: Admit) {
    engine.handle_admit(now, admit).expect("admitted");
}

#[inline(never)]
fn counted_poll(engine: &mut Engine, now: Duration) -> Option<Output> {
    engine.poll_output(now)
}

#[inline(never)]
fn counted_done(engine: &mut Engine, now: Duration, elapsed: Duration, samples: Vec<Sample>, batch: Batch) {
    engine.handle_batch_done(now, elapsed, samples);
    engine.recycle(batch);
}

/// What the `number`th sequence asks for.
fn request(load: &Load, number: u32, span: SpanIndex) -> Admit {
    let is_flood = load.floods && !number.is_multiple_of(4) && number < FIRST_NUMBER;
    let (prompt_tokens, generated_tokens_max) = match load.is_coming_and_going && !is_flood {
        true => (40 + number % 80, 20 + number * 7 % 41),
        false => (24, 1 << 18),
    };
    Admit {
        key: SequenceKey { router: RouterId("rtr_bench".to_owned()), number: number.into() },
        epoch: 0,
        span,
        prompt_tokens,
        tokens: (0..prompt_tokens).map(|t| number.wrapping_mul(31) + t).collect(),
        generated_tokens_max,
        stop_tokens: Vec::new(),
        priority: 0,
        tenant: match is_flood {
            true => format!("flood_{}", number % 4),
            false => format!("ten_{}", number % load.tenants),
        },
        weight: 1,
        targets: Targets::default(),
        domain: [7; 32],
    }
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
        kv_bytes: match load.pages {
            0 => 64 << 30,
            pages => pages * u64::from(sequence_count) * SHAPE.page_bytes() as u64,
        },
        ..Limits::default()
    };
    let mut engine = Engine::new(limits);
    let spans: Vec<_> = chains().iter().map(|chain| engine.handle_host(host(chain, load.are_alike))).collect();
    let admit = |number: u32| request(load, number, spans[number as usize % spans.len()]);
    for number in 0..sequence_count * load.known {
        engine.handle_admit(Duration::ZERO, admit(number)).expect("admitted");
    }
    let mut next = FIRST_NUMBER;
    // When those come that follow others, in batches.
    let mut coming: VecDeque<u64> = VecDeque::new();
    let mut now = Duration::ZERO;
    let mut in_flight = VecDeque::new();
    let mut cost = Cost { plan: Duration::ZERO, results: Duration::ZERO, batches: 0, gave_way: 0 };
    // Sequences reach page borders at different passes once they have run a while.
    let (warm_tokens, tokens) = (u64::from(sequence_count) * 20, u64::from(sequence_count) * u64::from(passes + 20));
    let (mut done_tokens, mut done_batches, mut gave_way_before) = (0, 0, 0);
    while done_tokens < tokens {
        let is_warm = done_tokens >= warm_tokens;
        let began = Instant::now();
        while coming.front().is_some_and(|at| *at <= done_batches) {
            coming.pop_front();
            match is_warm {
                true => counted_admit(&mut engine, now, admit(next)),
                false => engine.handle_admit(now, admit(next)).map(|_| ()).expect("admitted"),
            }
            next += 1;
        }
        while let Some(output) = if is_warm { counted_poll(&mut engine, now) } else { engine.poll_output(now) } {
            match output {
                Output::RunBatch(batch) => in_flight.push_back(batch),
                Output::EmitFinished { .. } => coming.push_back(done_batches + if load.floods { PAUSE_BATCHES } else { 1 }),
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
        done_batches += 1;
        let began = Instant::now();
        // As a device of weights takes: for each block what it reads, and something for each row.
        let work = |strand: &Strand| strand.blocks.len() as u64 * (40 + 4 * u64::from(strand.row_count));
        let elapsed = Duration::from_micros(30 + batch.strands.iter().map(work).sum::<u64>());
        now += elapsed;
        match is_warm {
            true => counted_done(&mut engine, now, elapsed, samples, batch),
            false => {
                engine.handle_batch_done(now, elapsed, samples);
                engine.recycle(batch);
                gave_way_before = engine.counters().preemption_count;
            }
        }
        let taken = began.elapsed();
        if is_warm {
            cost.plan += planned;
            cost.results += taken;
            cost.batches += 1;
        }
    }
    engine.check_integrity().expect("integrity");
    let gave_way = (engine.counters().preemption_count - gave_way_before) * 1000 / u64::from(passes);
    Cost { plan: cost.plan / passes, results: cost.results / passes, batches: cost.batches / u64::from(passes), gave_way }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [name, sequences, passes] = &arguments[..] {
        let load = LOADS.iter().find(|load| load.name == name).expect("a load of LOADS");
        let number = |text: &str| text.parse().expect("a number");
        let cost = pass_cost(load, number(sequences), number(passes));
        println!("a pass: {:?} of plans, {:?} of results, {} batches", cost.plan, cost.results, cost.batches);
        println!("{} sequences gave way in 1000 passes", cost.gave_way);
        return;
    }
    for load in &LOADS {
        println!("{}: sequences  batches  gave way in 1000 passes  plan us  results us  plan ns for each row", load.name);
        for sequences in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096] {
            let passes = (200_000 / sequences).clamp(32, 800);
            // The best of several: others use this machine.
            let costs: Vec<Cost> = (0..5).map(|_| pass_cost(load, sequences, passes)).collect();
            let best = costs.iter().min_by_key(|cost| cost.plan).expect("five");
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            let row_ns = us(best.plan) * 1e3 / f64::from(sequences) / 4.0;
            let (plan, results) = (us(best.plan), us(best.results));
            println!("{sequences:18}  {:7}  {:23}  {plan:7.1}  {results:10.1}  {row_ns:8.1}", best.batches, best.gave_way);
        }
    }
}
