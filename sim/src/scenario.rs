//! What a seed stands for: executors and their limits, models, wires, load, and what breaks when.

use ashlar_executor::state::limits::Limits;
use ashlar_registry::record::{DeploymentRecord, PlanPolicy};
use ashlar_wire::id::ExecutorId;

use crate::Micros;
use crate::device::Cost;
use crate::dice::Dice;
use crate::events::{Fault, NodeIndex};
use crate::links::Delays;
use crate::load::{self, Load};
use crate::models::{self, Model};
use crate::node::Identity;

/// When the load begins: executors have loaded their models by then.
const LOAD_FROM: Micros = 2_000_000;

/// A scenario.
pub(crate) struct Scenario {
    pub(crate) nodes: Vec<Identity>,
    pub(crate) models: Vec<Model>,
    /// Models that have no name at first.
    pub(crate) nameless: Vec<usize>,
    pub(crate) policy: PlanPolicy,
    pub(crate) delays: Delays,
    pub(crate) load: Load,
    pub(crate) faults: Vec<(Micros, Fault)>,
    /// Sequences of so many tokens fit every executor, whatever it hosts.
    pub(crate) always_fits_tokens: u32,
}

/// Draws the scenario of a seed; of a trace it has the load, and limits for it.
pub(crate) fn draw(seed: u64, trace: Option<&Load>) -> Scenario {
    let dice = Dice::new(seed);
    let load = match trace {
        Some(load) => load.clone(),
        None => load::draw(&mut dice.fork("load"), LOAD_FROM),
    };
    let mut of = dice.fork("models");
    let model_count = if of.chance(15) { 1 } else { of.within(2..=7) } as usize;
    // By this name seeds that once failed have the models that they had before there were adapters.
    let mut models = models::draw(&mut of, &mut dice.fork("windows"), &mut dice.fork("of adapters"), model_count);
    let mut of = dice.fork("deployments");
    for model in &mut models {
        let target = |of: &mut Dice, some: &[u32]| if of.chance(50) { None } else { Some(of.pick(some)) };
        model.deployment = DeploymentRecord {
            ttft_ms: target(&mut of, &[0, 20, 500]),
            gap_ms: target(&mut of, &[0, 5, 50, 500]),
            ..DeploymentRecord::default()
        };
    }
    let mut of = dice.fork("executors");
    let count = of.pick(&[1, 1, 2, 2, 3, 4]);
    let policy = PlanPolicy { spans_per_chain: of.pick(&[1, 1, 1, 2, 3]), replicas: of.pick(&[1, 2]) };
    let largest = models.iter().map(Model::bytes).max().unwrap_or(0);
    let total: u64 = models.iter().map(Model::bytes).sum();
    let two_classes = count > 2 && of.chance(30);
    let page_tokens = of.pick(&[16, 16, 32]);
    let page_bytes = |model: &Model| -> u64 {
        model.blocks.iter().filter_map(|block| block.kv_shape(page_tokens)).map(|shape| shape.page_bytes() as u64).sum()
    };
    let largest_page = models.iter().map(page_bytes).max().unwrap_or(1);
    let total_page: u64 = models.iter().map(page_bytes).sum();
    let pages = u64::from(load.longest().div_ceil(page_tokens) + 1);
    let mut always_fits_pages = u64::MAX;
    let nodes: Vec<Identity> = (0..count)
        .map(|index| {
            let mut limits = if trace.is_some() { trace_limits(&mut of) } else { limits(&mut of) };
            limits.page_tokens = page_tokens;
            limits.kv_bytes = largest_page * pages * of.pick(&[1, 1, 2, 3, 8]);
            limits.boundary_bytes = u64::from(page_tokens) * 4 * 2 * of.pick(&[0, 2, 9, 60]);
            always_fits_pages = always_fits_pages.min(limits.kv_bytes / (2 * total_page));
            assert_eq!(limits.check(), Ok(()), "drawn limits hold");
            // Now and then a chain fits no executor whole.
            let memory = of.pick(&[largest / 2 + 4, largest + 4, total / 2 + largest, 2 * total, 2 * total]);
            let (batch, row) = if trace.is_some() { (60, 2) } else { (of.pick(&[50, 300, 1500]), of.pick(&[1, 10, 60])) };
            Identity {
                id: ExecutorId(format!("exe_{index}")),
                class: if two_classes && index + 1 == count { "sim-v2".to_owned() } else { "sim-v1".to_owned() },
                memory_bytes: memory,
                limits,
                cost: Cost { batch, row },
                check_every: if trace.is_some() { 16 } else { 1 },
                load: of.pick(&[1_000, 20_000]),
                retire: of.pick(&[100_000, 3_000_000, 120_000_000]),
            }
        })
        .collect();
    let mut of = dice.fork("wires");
    let delays = Delays { least: of.pick(&[20, 200, 2_000]), more: of.pick(&[10, 500, 5_000]), notice: of.pick(&[1_000, 500_000]) };
    let nameless = if models.len() > 2 { (2..models.len()).filter(|_| dice.fork("names").chance(30)).collect() } else { Vec::new() };
    let faults = faults(&mut dice.fork("faults"), count, models.len(), load.last());
    let always_fits_tokens = always_fits_pages.min(1 << 24) as u32 * page_tokens;
    Scenario { nodes, models, nameless, policy, delays, load, faults, always_fits_tokens }
}

fn limits(of: &mut Dice) -> Limits {
    let step_tokens_max = of.pick(&[8, 17, 32, 64, 200]);
    let chunk_tokens_max = of.within(1..=u64::from(step_tokens_max)) as u32;
    Limits {
        step_tokens_max,
        chunk_tokens_max,
        gap_ms: of.pick(&[0, 0, 5, 50]),
        ttft_ms: of.pick(&[0, 500]),
        batch_ms_max: of.pick(&[0, 0, 3]),
        row_wait_ms: of.pick(&[1, 200]),
        regroup_wait_ms: of.fork("regroup").pick(&[0, 2, 20, 100]),
        batches_in_flight_max: of.pick(&[1, 2, 2, 4]),
        sequences_max: (of.pick(&[2, 8, 32]) as u32).min(step_tokens_max),
        waiting_max: of.pick(&[3, 1000, 1000, 1000]),
        hidden_rows_max: step_tokens_max * of.pick(&[2, 5]),
        link_rows_max: chunk_tokens_max * of.pick(&[1, 3]),
        prefix_cache: of.chance(85),
        ..Limits::default()
    }
}

fn trace_limits(of: &mut Dice) -> Limits {
    Limits { gap_ms: 100, batches_in_flight_max: of.pick(&[1, 2, 4]), step_tokens_max: 512, chunk_tokens_max: 512, ..Limits::default() }
}

fn faults(of: &mut Dice, nodes: usize, models: usize, last: Micros) -> Vec<(Micros, Fault)> {
    let mut faults = Vec::new();
    if of.chance(35) {
        return faults;
    }
    let window = last.saturating_sub(LOAD_FROM) + 500_000;
    for _ in 0..of.within(1..=7) {
        // Some before all models are loaded.
        let at = LOAD_FROM - 1_500_000 + of.next() % (window + 1_500_000);
        let node = NodeIndex(of.within(0..=nodes as u64 - 1) as usize);
        let model = of.within(0..=models as u64 - 1) as usize;
        match of.within(0..=9) {
            0..=2 => {
                faults.push((at, Fault::Kill(node)));
                // Within its lease, or long after it.
                faults.push((at + of.pick(&[300_000, 12_000_000]), Fault::Restart(node)));
            }
            3..=4 => faults.push((at, Fault::Cut(of.next()))),
            5 if nodes > 1 => {
                faults.push((at, Fault::Drain(node)));
                faults.push((at + 20_000_000, Fault::Restart(node)));
            }
            6..=7 => {
                faults.push((at, Fault::RemoveModel(model)));
                faults.push((at + of.pick(&[1, 400_000, 5_000_000]), Fault::AddModel(model)));
            }
            _ => faults.push((at, Fault::AddModel(model))),
        }
    }
    faults
}
