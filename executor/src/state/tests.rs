//! The engine against a modelled device whose KV is a hash of position and history: one wrong page, lost chunk or
//! mixed-up row changes the tokens. Integrity is checked after every event.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_kernels::ops::{KvFormat, KvShape};
use ashlar_wire::id::{RouterId, SequenceKey};
use proptest::prelude::*;

use super::batch::{Batch, RowInput, RowOutput, Sample, SampledToken, SequenceId};
use super::engine::{Engine, HostSpan, Output};
use super::limits::Limits;
use super::segments::BlockIndex;
use super::sequence::{Admit, Reason, SpanIndex};

const PAGE: u32 = 16;
const SHAPE: KvShape = KvShape { kv_heads: 1, head_dim: 4, page_tokens: PAGE as usize, format: KvFormat::F32 };
/// Blocks below this are attention blocks.
const ATTENTION_BELOW: u32 = 1000;

fn mix(values: &[u64]) -> u64 {
    values.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, value| (hash ^ value).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29))
}

/// A device whose hidden state is one number. An attention block's output mixes its own rows of the pages.
#[derive(Default)]
struct ModelDevice {
    /// What each (class is one, so) block and slot holds: one number a token.
    pages: BTreeMap<u32, [u64; PAGE as usize]>,
    hidden: BTreeMap<u32, u64>,
    /// Position and token that was sampled last, by sequence.
    sampled: BTreeMap<SequenceId, (u32, u32)>,
}

impl ModelDevice {
    fn run(&mut self, batch: &Batch, link_rows: &BTreeMap<SequenceId, Vec<u64>>) -> (Vec<Sample>, Vec<(SequenceId, u32, Vec<u64>)>) {
        let mut state: Vec<Vec<u64>> = Vec::new();
        for rows in &batch.rows {
            let mut values: Vec<u64> = match &rows.input {
                RowInput::Tokens(tokens) => tokens.iter().map(|token| u64::from(*token)).collect(),
                RowInput::Hidden(slots) => slots.iter().map(|slot| self.hidden[slot]).collect(),
                RowInput::Link => link_rows[&rows.sequence].clone(),
                RowInput::Sampled => {
                    let (position, token) = self.sampled[&rows.sequence];
                    assert_eq!(position, rows.start, "a row takes the token sampled last");
                    vec![u64::from(token)]
                }
            };
            assert_eq!(values.len(), rows.count as usize);
            let mut attention = 0;
            for block in &batch.blocks {
                for (i, value) in values.iter_mut().enumerate() {
                    let position = rows.start + i as u32;
                    *value = mix(&[u64::from(block.0), u64::from(position), *value]);
                }
                if block.0 >= ATTENTION_BELOW {
                    continue;
                }
                let table = &rows.tables[attention];
                attention += 1;
                for (i, value) in values.iter_mut().enumerate() {
                    let position = rows.start + i as u32;
                    self.pages.entry(table[(position / PAGE) as usize]).or_default()[(position % PAGE) as usize] = *value;
                    let history: Vec<u64> = (0..=position).map(|p| self.pages[&table[(p / PAGE) as usize]][(p % PAGE) as usize]).collect();
                    *value = mix(&history);
                }
            }
            state.push(values);
        }
        let (mut samples, mut links) = (Vec::new(), Vec::new());
        for (rows, values) in batch.rows.iter().zip(&state) {
            match &rows.output {
                RowOutput::Hidden(slots) => slots.iter().zip(values).for_each(|(slot, value)| {
                    self.hidden.insert(*slot, *value);
                }),
                RowOutput::Link => links.push((rows.sequence, rows.start, values.clone())),
                RowOutput::Sample(None) => {}
                RowOutput::Sample(Some(position)) => {
                    let token = (values.last().expect("at least one row") % 97) as u32;
                    self.sampled.insert(rows.sequence, (*position, token));
                    samples.push(Sample {
                        sequence: rows.sequence,
                        position: *position,
                        token: Ok(SampledToken { token, logprob: 0.0, top: Vec::new() }),
                    });
                }
            }
        }
        (samples, links)
    }
}

/// Tokens of a chain run alone, straight from the definition, with no engine.
fn oracle(blocks: &[u32], prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    let mut history: Vec<Vec<u64>> = vec![Vec::new(); blocks.len()];
    let mut computed = 0;
    for _ in 0..count {
        let mut last = 0;
        for position in computed..tokens.len() {
            let mut value = u64::from(tokens[position]);
            for (b, block) in blocks.iter().enumerate() {
                value = mix(&[u64::from(*block), position as u64, value]);
                if *block < ATTENTION_BELOW {
                    history[b].push(value);
                    value = mix(&history[b]);
                }
            }
            last = value;
        }
        computed = tokens.len();
        tokens.push((last % 97) as u32);
    }
    tokens.split_off(prompt.len())
}

fn host(blocks: &[u32], from: usize, to: usize) -> HostSpan {
    let mut lineage = [0u8; 32];
    let mut lineages = Vec::new();
    for block in blocks {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&lineage).update(&block.to_le_bytes());
        lineage = *hasher.finalize().as_bytes();
        lineages.push(lineage);
    }
    HostSpan {
        blocks: blocks[from..to].iter().map(|block| BlockIndex(*block)).collect(),
        lineages: lineages[from..to].to_vec(),
        kv_shapes: blocks[from..to].iter().map(|block| (*block < ATTENTION_BELOW).then_some(SHAPE)).collect(),
        begins_with_embed: from == 0,
        ends_with_head: to == blocks.len(),
    }
}

fn admit(number: u64, span: SpanIndex, prompt: &[u32], count: u32, priority: i32) -> Admit {
    Admit {
        key: SequenceKey { router: RouterId("rtr_test".to_owned()), number },
        epoch: 0,
        span,
        tokens: prompt.to_vec(),
        prompt_tokens: prompt.len() as u32,
        generated_tokens_max: count,
        stop_tokens: Vec::new(),
        priority,
        domain: [7; 32],
    }
}

fn limits(pages: u64, step: u32, chunk: u32) -> Limits {
    Limits {
        page_tokens: PAGE,
        step_tokens_max: step,
        chunk_tokens_max: chunk,
        sequences_max: step.min(8),
        hidden_rows_max: 4 * step,
        link_rows_max: 2 * chunk,
        kv_bytes: pages * SHAPE.page_bytes() as u64,
        ..Limits::default()
    }
}

/// One engine with its device.
struct Node {
    engine: Engine,
    device: ModelDevice,
    inbox: BTreeMap<SequenceId, Vec<u64>>,
    /// Batches handed out and not run, with the rows that came over links for them.
    in_flight: VecDeque<(Batch, BTreeMap<SequenceId, Vec<u64>>)>,
    tokens: BTreeMap<u64, Vec<u32>>,
    cached_tokens: BTreeMap<u64, u32>,
    finished: BTreeMap<u64, (Reason, u32)>,
    keys: BTreeMap<SequenceId, u64>,
    models_met_max: usize,
    in_flight_most: usize,
    /// Sequences that failed.
    failed: BTreeSet<u64>,
    now_us: u64,
}

/// What leaves a node for its neighbour.
enum Sent {
    Rows(u64, u32, Vec<u64>),
    Token(u64, u32, SampledToken),
    Consumed(u64, u32),
    Released(u64),
}

impl Node {
    fn new(limits: Limits) -> Self {
        Self {
            engine: Engine::new(limits),
            device: ModelDevice::default(),
            inbox: BTreeMap::new(),
            in_flight: VecDeque::new(),
            tokens: BTreeMap::new(),
            cached_tokens: BTreeMap::new(),
            finished: BTreeMap::new(),
            keys: BTreeMap::new(),
            models_met_max: 0,
            in_flight_most: 0,
            failed: BTreeSet::new(),
            now_us: 0,
        }
    }

    fn admit(&mut self, admit: Admit) {
        let number = admit.key.number;
        let id = self.engine.handle_admit(super::Now::from_micros(self.now_us), admit).expect("admitted");
        self.keys.insert(id, number);
        self.engine.check_integrity().expect("integrity after admit");
    }

    /// Carries out outputs until nothing is left, then runs the oldest batch in flight: all others were planned before anything
    /// was known of it. Returns whether a batch ran.
    fn step(&mut self, sent: &mut Vec<Sent>) -> bool {
        self.now_us += 100;
        while let Some(output) = self.engine.poll_output(super::Now::from_micros(self.now_us)) {
            match output {
                Output::RunBatch(batch) => {
                    let distinct: BTreeSet<SequenceId> = batch.rows.iter().map(|rows| rows.sequence).collect();
                    assert_eq!(distinct.len(), batch.rows.len(), "a sequence is in a batch once");
                    assert!(batch.row_count() <= self.engine.limits.step_tokens_max);
                    self.models_met_max = self.models_met_max.max(batch.span_count);
                    let mut link_rows = BTreeMap::new();
                    for rows in batch.rows.iter().filter(|rows| matches!(rows.input, RowInput::Link)) {
                        let inbox = self.inbox.get_mut(&rows.sequence).expect("rows came");
                        link_rows.insert(rows.sequence, inbox.drain(..rows.count as usize).collect());
                    }
                    self.in_flight.push_back((batch, link_rows));
                    assert!(self.in_flight.len() <= self.engine.limits.batches_in_flight_max as usize);
                    self.in_flight_most = self.in_flight_most.max(self.in_flight.len());
                    self.engine.check_integrity().expect("integrity with a batch in flight");
                }
                Output::EmitToken { sequence, index, token } => {
                    let tokens = self.tokens.entry(self.keys[&sequence]).or_default();
                    assert_eq!(tokens.len(), index as usize, "no token is lost or repeated");
                    tokens.push(token.token);
                }
                Output::EmitFinished { sequence, reason } => {
                    let key = self.keys[&sequence];
                    self.finished.insert(key, (reason, self.cached_tokens[&key]));
                }
                Output::EmitFailed { sequence, .. } => {
                    self.failed.insert(self.keys[&sequence]);
                }
                Output::SendToken { sequence, position, token } => sent.push(Sent::Token(self.keys[&sequence], position, token)),
                Output::SendConsumed { sequence, position } => sent.push(Sent::Consumed(self.keys[&sequence], position)),
                Output::Release(sequence) => sent.push(Sent::Released(self.keys[&sequence])),
                Output::EmitStarted { sequence, cached_tokens, .. } => {
                    self.cached_tokens.insert(self.keys[&sequence], cached_tokens);
                }
            }
        }
        let Some((batch, link_rows)) = self.in_flight.pop_front() else { return false };
        let (samples, links) = self.device.run(&batch, &link_rows);
        for (sequence, start, rows) in links {
            sent.push(Sent::Rows(self.keys[&sequence], start, rows));
        }
        self.engine.handle_batch_done(samples);
        self.engine.check_integrity().expect("integrity after a batch");
        true
    }

    fn run_dry(&mut self) {
        let mut sent = Vec::new();
        for _ in 0..100_000 {
            if !self.step(&mut sent) && self.engine.sequences.is_empty() {
                assert_eq!(self.engine.gauges().used_pages, 0);
                assert!(self.failed.is_empty(), "failed: {:?}", self.failed);
                return;
            }
        }
        panic!("{} sequences never ended", self.engine.sequences.len());
    }

    fn id(&self, number: u64) -> Option<SequenceId> {
        self.engine.find(&SequenceKey { router: RouterId("rtr_test".to_owned()), number }, 0)
    }
}

/// A family: shared trunk, own tops, one unrelated chain. 2000 is embed, 2001 head.
fn family() -> Vec<Vec<u32>> {
    vec![
        vec![2000, 1, 1001, 2, 1002, 3, 1003, 2001],
        vec![2000, 1, 1001, 2, 1002, 13, 1003, 2001],
        vec![2000, 1, 1001, 22, 1002, 3, 1003, 2001],
        vec![2100, 31, 1031, 32, 1032, 2101],
    ]
}

#[test]
fn models_meet_in_shared_segments_and_keep_their_tokens() {
    let mut node = Node::new(limits(200, 64, 64));
    let family = family();
    let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| (0..20 + i).map(|t| (t * 7 + i) % 97).collect()).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        node.admit(admit(i as u64, spans[i % 4], prompt, 12, 0));
    }
    node.run_dry();
    assert!(node.models_met_max >= 3, "three models share their first blocks, {} met", node.models_met_max);
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(node.tokens[&(i as u64)], oracle(&family[i % 4], prompt, 12), "sequence {i}");
    }
}

#[test]
fn second_prompt_takes_cached_pages_and_gives_the_same_tokens() {
    let mut node = Node::new(limits(100, 64, 64));
    let blocks = &family()[0];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt: Vec<u32> = (0..70).map(|t| t * 3 % 97).collect();
    node.admit(admit(1, span, &prompt, 5, 0));
    node.run_dry();
    node.admit(admit(2, span, &prompt, 5, 0));
    node.run_dry();
    assert_eq!(node.tokens[&1], node.tokens[&2]);
    assert_eq!(node.finished[&2], (Reason::Length, 64), "four full pages of 16 are before the last token");
    // Another cache domain sees nothing.
    node.admit(Admit { domain: [8; 32], ..admit(3, span, &prompt, 5, 0) });
    node.run_dry();
    assert_eq!(node.finished[&3], (Reason::Length, 0));
    assert_eq!(node.tokens[&1], node.tokens[&3]);
}

#[test]
fn a_prompt_of_whole_pages_leaves_its_last_token_to_compute() {
    let mut node = Node::new(limits(100, 64, 64));
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt: Vec<u32> = (0..32).collect();
    for number in [1, 2] {
        node.admit(admit(number, span, &prompt, 3, 0));
        node.run_dry();
    }
    assert_eq!(node.finished[&2], (Reason::Length, 16));
    assert_eq!(node.tokens[&1], node.tokens[&2]);
}

#[test]
fn preempted_sequence_gets_same_tokens() {
    // Two attention blocks, 12 pages: six pages of tokens in all, for three sequences that grow to three each.
    let mut node = Node::new(Limits { prefix_cache: false, ..limits(12, 16, 16) });
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| (0..17).map(|t| t + i).collect()).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        node.admit(admit(i as u64, span, prompt, 28, 0));
    }
    node.run_dry();
    assert!(node.engine.counters().preemption_count > 0);
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(node.tokens[&(i as u64)], oracle(blocks, prompt, 28));
    }
}

#[test]
fn sequence_that_can_never_fit_is_refused_with_the_numbers() {
    let mut node = Node::new(limits(12, 16, 16));
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let refusal = node.engine.handle_admit(super::Now::ZERO, admit(1, span, &[1; 90], 20, 0)).expect_err("refused");
    assert_eq!(refusal.1, "110 tokens need 14 KV pages, this executor has 12 for the model's shape");
}

#[test]
fn cancelled_sequence_frees_everything_at_once() {
    let mut node = Node::new(limits(100, 16, 16));
    let family = family();
    let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let mut sent = Vec::new();
    for steps in 0..12 {
        node.admit(admit(100 + steps, spans[steps as usize % 4], &[5; 40], 9, 0));
        for _ in 0..steps {
            node.step(&mut sent);
        }
        if let Some(id) = node.id(100 + steps) {
            node.engine.handle_cancel(id);
        }
        node.engine.check_integrity().expect("integrity after cancel");
        while node.step(&mut sent) {}
        assert_eq!(node.engine.gauges().used_pages, 0);
    }
}

#[test]
fn a_model_added_while_others_run_changes_no_token() {
    for at in 0..14 {
        let mut node = Node::new(limits(200, 16, 8));
        let family = family();
        let first = node.engine.handle_host(host(&family[0], 0, family[0].len()));
        let prompt: Vec<u32> = (0..50).collect();
        node.admit(admit(1, first, &prompt, 10, 0));
        let mut sent = Vec::new();
        for _ in 0..at {
            node.step(&mut sent);
        }
        let second = node.engine.handle_host(host(&family[1], 0, family[1].len()));
        node.engine.check_integrity().expect("integrity after a re-cut");
        node.admit(admit(2, second, &prompt, 10, 0));
        for _ in 0..at {
            node.step(&mut sent);
        }
        node.engine.handle_unhost(second);
        let third = node.engine.handle_host(host(&family[2], 0, family[2].len()));
        node.admit(admit(3, third, &prompt, 10, 0));
        while !node.engine.sequences.is_empty() {
            node.step(&mut sent);
        }
        while node.step(&mut sent) {}
        assert_eq!(node.tokens[&1], oracle(&family[0], &prompt, 10), "added at step {at}");
        assert_eq!(node.tokens[&3], oracle(&family[2], &prompt, 10), "added at step {at}");
        assert!(node.failed.iter().all(|number| *number == 2), "only the model taken away may fail");
    }
}

#[test]
fn the_device_has_its_next_batches_before_a_token_is_known() {
    for in_flight in [1, 2, 4] {
        let mut node = Node::new(Limits { batches_in_flight_max: in_flight, ..limits(100, 16, 16) });
        let blocks = &family()[3];
        let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
        node.admit(admit(1, span, &[1, 2, 3], 20, 0));
        for step in 0..20 {
            assert!(node.step(&mut Vec::new()));
            // One was run; the last token is never fed back, so no batch follows the twentieth.
            assert_eq!(node.in_flight.len(), (in_flight as usize - 1).min(19 - step));
        }
        node.run_dry();
        assert_eq!(node.tokens[&1], oracle(blocks, &[1, 2, 3], 20), "{in_flight} in flight");
        assert_eq!(node.engine.counters().discarded_rows, 0, "an end by length is known beforehand");
    }
}

#[test]
fn an_end_found_late_discards_no_more_than_what_is_in_flight() {
    let blocks = &family()[3];
    let alone = oracle(blocks, &[1, 2, 3], 20);
    let end = (1..20).find(|&i| !alone[..i].contains(&alone[i])).expect("a token that comes once");
    for in_flight in [1, 2, 4] {
        let mut node = Node::new(Limits { batches_in_flight_max: in_flight, ..limits(100, 16, 16) });
        let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
        node.admit(Admit { stop_tokens: vec![alone[end]], ..admit(1, span, &[1, 2, 3], 20, 0) });
        node.run_dry();
        assert_eq!(node.tokens[&1], alone[..=end]);
        assert_eq!(node.finished[&1].0, Reason::Stop);
        assert_eq!(node.engine.counters().discarded_rows, u64::from(in_flight) - 1);
    }
}

#[test]
fn pages_stay_until_no_batch_in_flight_can_write_to_them() {
    let mut node = Node::new(Limits { batches_in_flight_max: 4, prefix_cache: false, ..limits(100, 16, 16) });
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    node.admit(admit(1, span, &[7; 40], 20, 0));
    let mut sent = Vec::new();
    assert!(node.step(&mut sent));
    assert_eq!(node.in_flight.len(), 3);
    node.engine.handle_cancel(node.id(1).expect("it runs"));
    for _ in 0..3 {
        assert!(node.engine.gauges().used_pages > 0);
        assert!(node.step(&mut sent));
    }
    assert_eq!(node.engine.gauges().used_pages, 0);
}

/// Runs sequences on a chain cut over two engines.
fn run_cut(blocks: &[u32], at: usize, prompts: &[Vec<u32>], count: u32, limits: &Limits) -> BTreeMap<u64, Vec<u32>> {
    let (mut up, mut down) = (Node::new(limits.clone()), Node::new(limits.clone()));
    let upper = up.engine.handle_host(host(blocks, 0, at));
    let lower = down.engine.handle_host(host(blocks, at, blocks.len()));
    for (i, prompt) in prompts.iter().enumerate() {
        up.admit(admit(i as u64, upper, prompt, count, 0));
        down.admit(admit(i as u64, lower, prompt, count, 0));
    }
    for _ in 0..20_000 {
        let (mut from_up, mut from_down) = (Vec::new(), Vec::new());
        let ran = up.step(&mut from_up) | down.step(&mut from_down);
        let moved = !from_up.is_empty() || !from_down.is_empty();
        for sent in from_up {
            match sent {
                Sent::Rows(number, start, rows) => {
                    let Some(id) = down.id(number) else { continue };
                    assert!(down.engine.handle_hidden(id, start, rows.len() as u32));
                    down.inbox.entry(id).or_default().extend(rows);
                }
                Sent::Released(number) => {
                    if let Some(id) = down.id(number) {
                        down.engine.handle_cancel(id);
                    }
                }
                Sent::Token(..) | Sent::Consumed(..) => panic!("only a downstream engine sends these"),
            }
        }
        for sent in from_down {
            match sent {
                Sent::Token(number, position, token) => {
                    if let Some(id) = up.id(number) {
                        up.engine.handle_link_token(id, position, token);
                    }
                }
                Sent::Consumed(number, position) => {
                    if let Some(id) = up.id(number) {
                        up.engine.handle_consumed(id, position);
                    }
                }
                Sent::Released(_) => {}
                Sent::Rows(..) => panic!("the lower span ends with the head"),
            }
        }
        if !ran && !moved && up.engine.sequences.is_empty() && down.engine.sequences.is_empty() {
            assert_eq!(down.engine.gauges().used_pages, 0);
            return up.tokens;
        }
    }
    panic!("sequences never ended");
}

#[test]
fn a_chain_cut_over_two_engines_gives_the_same_tokens() {
    let blocks = &family()[0];
    let prompts: Vec<Vec<u32>> = (1..6).map(|i| (0..i * 9).collect()).collect();
    for at in 1..blocks.len() {
        let tokens = run_cut(blocks, at, &prompts, 7, &limits(400, 16, 7));
        for (i, prompt) in prompts.iter().enumerate() {
            assert_eq!(tokens[&(i as u64)], oracle(blocks, prompt, 7), "cut before block {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever the mix, chunking, page pressure, preemption and cache state: the tokens of each sequence run alone.
    #[test]
    fn any_mix_gives_each_sequence_its_own_tokens(
        requests in proptest::collection::vec((0usize..4, 1usize..60, 1u32..14, 0u32..3, 0i32..2, 0usize..4), 1..10),
        step in 4u32..40, chunk in 1u32..20, spare_pages in 0u64..60, prefix_cache: bool,
        in_flight in proptest::sample::select(vec![1u32, 2, 4]), stop in proptest::option::of(0u32..97), cancel in proptest::option::of(0u64..10),
    ) {
        let family = family();
        let chunk = chunk.min(step);
        // The largest sequence (74 tokens, 5 pages) on the widest chain's share must fit.
        let mut node = Node::new(Limits { prefix_cache, batches_in_flight_max: in_flight, ..limits(18 + spare_pages, step, chunk) });
        let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
        let mut sent = Vec::new();
        let mut expected = BTreeMap::new();
        for (number, (model, length, count, salt, priority, steps)) in requests.iter().enumerate() {
            let prompt: Vec<u32> = (0..*length as u32).map(|t| (t * 5 + salt) % 97).collect();
            let mut tokens = oracle(&family[*model], &prompt, *count as usize);
            if let Some(end) = tokens.iter().position(|token| Some(*token) == stop) {
                tokens.truncate(end + 1);
            }
            expected.insert(number as u64, tokens);
            let admit = admit(number as u64, spans[*model], &prompt, *count, *priority);
            node.admit(Admit { stop_tokens: stop.into_iter().collect(), ..admit });
            for _ in 0..*steps {
                node.step(&mut sent);
            }
        }
        if let Some(number) = cancel && let Some(id) = node.id(number) {
            node.engine.handle_cancel(id);
            expected.remove(&number);
        }
        node.run_dry();
        for (number, tokens) in expected {
            prop_assert_eq!(&node.tokens[&number], &tokens, "sequence {}", number);
        }
        prop_assert_eq!(node.engine.gauges().used_pages, 0);
    }
}
