//! How well siblings meet where their chains run together, and what it costs where that does not pay: closed loops on devices that cost what
//! SmolLM2-135M costs on two cores, and what a model of a few thousand weights does. The counts are those of docs/scheduling.md, "Meeting".

use super::device::host;
use super::node::{Node, admit, limits};
use crate::state::batch::Batch;
use crate::state::limits::Limits;
use crate::state::sequence::SpanIndex;

/// Blocks from here on say how many layers they stand for, in their last two digits.
const LAYERS_FROM: u32 = 10_000;
const HEAD: u32 = 90_008;

/// A chain for each of `models` that share so many of 30 layers, and the head of eight layers' bytes if `head`.
fn descendants(models: u32, shared: u32, head: bool) -> Vec<Vec<u32>> {
    let chain = |m: u32| {
        let trunk = if shared > 0 { vec![2000, 1, LAYERS_FROM + shared] } else { vec![2000 + 10 * m, 1 + m] };
        let own = [100 + m, 20_000 + 100 * m + (30 - shared), if head { HEAD } else { HEAD + 100 * m }];
        trunk.into_iter().chain(own).collect()
    };
    (0..models).map(chain).collect()
}

fn layers(batch: &Batch) -> u64 {
    batch.blocks.iter().filter(|block| block.0 >= LAYERS_FROM).map(|block| u64::from(block.0 % 100)).sum()
}

/// A layer reads its weights in 80 us and takes 8 us for each row; a batch takes 30 us, whatever it does.
fn smollm2_us(batch: &Batch) -> u64 {
    30 + layers(batch) * (80 + 8 * u64::from(batch.row_count))
}

/// A layer takes 5 us, and one for each row.
fn small_us(batch: &Batch) -> u64 {
    30 + layers(batch) * (5 + u64::from(batch.row_count))
}

/// What a closed loop came to.
struct Outcome {
    tokens_s: f64,
    /// Rows of a batch through the shared start, the tops and the head, on average.
    rows: [f64; 3],
}

/// So many streams for each chain, and so many requests of each stream.
fn closed_loop(chains: &[Vec<u32>], node: Node, streams: u64, requests: u64, prompt: u32, tokens: u64) -> Outcome {
    let mut node = node;
    let spans: Vec<SpanIndex> = chains.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let (clients, mut sent) = (streams * chains.len() as u64, Vec::new());
    let mut asked = vec![0u64; clients as usize];
    let mut total = 0;
    loop {
        for client in 0..clients {
            let turn = &mut asked[client as usize];
            let is_over = *turn == 0 || node.finished.contains_key(&(client + clients * (*turn - 1)));
            if is_over && *turn < requests {
                let number = client + clients * *turn;
                // No two answers are as long.
                let (count, span) = (tokens + number * 7 % 16, spans[client as usize % spans.len()]);
                let prompt: Vec<u32> = (0..prompt).map(|t| (t * 7 + number as u32 * 13) % 97).collect();
                node.admit(admit(number, span, &prompt, count as u32, 0));
                (*turn, total) = (*turn + 1, total + count);
            }
        }
        if !node.step(&mut sent) && node.engine.sequences.is_empty() {
            break;
        }
    }
    let through = |from: u32, to: u32| {
        let of = node.crossed.range(from..to).map(|(_, counts)| *counts);
        let (batches, rows) = of.fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1));
        rows as f64 / batches as f64
    };
    let rows = [through(LAYERS_FROM, 20_000), through(20_000, HEAD), through(HEAD, u32::MAX)];
    Outcome { tokens_s: total as f64 * 1e6 / node.now_us as f64, rows }
}

fn node(regroup_wait_ms: u32, batches_in_flight_max: u32, cost_us: fn(&Batch) -> u64) -> Node {
    let limits = Limits { sequences_max: 32, prefix_cache: false, regroup_wait_ms, batches_in_flight_max, ..limits(20_000, 256, 256) };
    let mut node = Node::new(limits);
    (node.cost_us, node.between_us) = (Some(cost_us), 30);
    node
}

/// Eight descendants that share 22 of 30 layers and the head: the counts of docs/scheduling.md, "Meeting".
#[test]
fn siblings_meet_wherever_their_chains_do() {
    let alone = closed_loop(&descendants(8, 0, false), node(100, 2, smollm2_us), 1, 3, 16, 128);
    // The ideal: of each pass the trunk and the head once, the tops eight times, and the rows' own time.
    let (apart, met) = (8 * 38 * 88, 30 * (80 + 8 * 8) + 8 * 8 * 88);
    let ideal = f64::from(apart) / f64::from(met);
    for in_flight in [1, 2] {
        let [off, on] = [0, 100].map(|wait| closed_loop(&descendants(8, 22, true), node(wait, in_flight, smollm2_us), 1, 3, 16, 128));
        let gains = [off.tokens_s / alone.tokens_s, on.tokens_s / alone.tokens_s];
        println!("{in_flight} in flight: {gains:.2?} of {ideal:.2}, rows {:.2?} and {:.2?}", off.rows, on.rows);
        assert!(off.rows[0] > 8.0 && on.rows[0] > 8.0, "all decode together through the trunk: {:?}, {:?}", off.rows, on.rows);
        assert!(off.rows[2] < 1.5 && on.rows[2] > 8.0, "they wait for each other before the head: {:?}, {:?}", off.rows, on.rows);
        assert!(gains[0] < 0.7 * ideal && gains[1] > 0.9 * ideal, "{gains:?} of {ideal}");
    }
}

/// Whatever is shared: no slower than batches of whole models by more than 3%, on a device where a batch costs 60 us for its own sake and a
/// layer 6, and on one where a layer costs 88.
#[test]
fn sharing_is_not_slower_than_whole_models() {
    for cost_us in [small_us as fn(&Batch) -> u64, smollm2_us] {
        for (models, streams) in [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)] {
            let whole = closed_loop(&descendants(models, 0, false), node(100, 2, cost_us), streams, 6, 16, 96);
            for (shared, head) in [(1, false), (1, true), (8, true), (22, true)] {
                let met = closed_loop(&descendants(models, shared, head), node(100, 2, cost_us), streams, 6, 16, 96);
                let ratio = met.tokens_s / whole.tokens_s;
                println!("{models} models, {streams} streams of each, {shared} layers shared, head {head}: {ratio:.3}");
                assert!(ratio >= 0.97, "{models} models, {streams} streams of each, {shared} layers shared, head {head}: {ratio:.3}");
            }
        }
    }
}
