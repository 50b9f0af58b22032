//! A modelled device: it keeps what the real one keeps (blocks, pages, page tables, hidden rows, samplers), takes the same commands in
//! order, and computes the hashes of `alone`. Its time is a cost for each batch.

use std::collections::{BTreeMap, VecDeque};

use ashlar_executor::state::batch::{Batch, RowInput, RowOutput, Sample, SampledToken, SequenceId};
use ashlar_executor::state::segments::BlockIndex;
use ashlar_executor::state::sequence::SpanIndex;

use crate::Micros;
use crate::adapters::Adapter;
use crate::alone::{GRANULE, accept, embed, sample, through, window_hash};
use crate::dice::mix;
use crate::models::Block;

/// What the device is told, as in `executor/src/io/device.rs`.
#[derive(Debug)]
pub(crate) enum Command {
    Load(BlockIndex, Block, u32),
    Evict(BlockIndex),
    /// From now on the blocks of a span have these adapters.
    Adapt(SpanIndex, Vec<Option<Adapter>>),
    Admit(SequenceId, Sampler),
    Release(SequenceId),
    /// A batch, and the rows that came over links for it.
    Run(Box<Batch>, BTreeMap<SequenceId, Vec<u64>>),
}

/// How tokens of a sequence are sampled.
#[derive(Debug)]
pub(crate) struct Sampler {
    pub(crate) seed: u64,
    pub(crate) domain: [u8; 32],
    /// Hash of prompt and tokens so far.
    pub(crate) history: u64,
    /// Position and token that was sampled last.
    pub(crate) latest: Option<(u32, u32)>,
}

/// What a batch costs: so much, and so much for each row, in each block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) batch: Micros,
    pub(crate) row: Micros,
}

impl Cost {
    pub(crate) fn of(&self, blocks: usize, rows: u32) -> Micros {
        blocks as Micros * (self.batch + self.row * Micros::from(rows))
    }
}

/// Hidden rows that a batch sends down a link.
pub(crate) struct LinkRows {
    pub(crate) sequence: SequenceId,
    pub(crate) start: u32,
    pub(crate) width: u32,
    pub(crate) rows: Vec<u64>,
}

/// A page of one attention block.
#[derive(Debug, Clone)]
struct Page {
    rows: Vec<u64>,
    /// Hash of the rows of a granule up to each.
    hashes: Vec<u64>,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Device {
    class: u64,
    page_tokens: u32,
    pub(crate) cost: Cost,
    pub(crate) blocks: BTreeMap<BlockIndex, (Block, u32)>,
    /// Of each block of a span.
    adapters: BTreeMap<SpanIndex, Vec<Option<Adapter>>>,
    /// By heads (slots of each KV shape are numbered apart) and slot.
    pages: BTreeMap<(usize, u32), Page>,
    /// By width and slot.
    hidden: BTreeMap<(u32, u32), u64>,
    tables: BTreeMap<SequenceId, Vec<Vec<u32>>>,
    pub(crate) samplers: BTreeMap<SequenceId, Sampler>,
    pub(crate) commands: VecDeque<Command>,
    /// How long the batch takes that runs, if one does.
    pub(crate) running: Option<Micros>,
}

impl Device {
    pub(crate) fn new(class: u64, page_tokens: u32, cost: Cost) -> Self {
        Self {
            class,
            page_tokens,
            cost,
            blocks: BTreeMap::new(),
            adapters: BTreeMap::new(),
            pages: BTreeMap::new(),
            hidden: BTreeMap::new(),
            tables: BTreeMap::new(),
            samplers: BTreeMap::new(),
            commands: VecDeque::new(),
            running: None,
        }
    }

    /// Carries out commands up to the next batch and begins that one; the time that it takes, if one was begun.
    pub(crate) fn begin(&mut self) -> Option<Micros> {
        if self.running.is_some() {
            return None;
        }
        while let Some(command) = self.commands.pop_front() {
            match command {
                Command::Load(place, block, width) => drop(self.blocks.insert(place, (block, width))),
                Command::Evict(place) => drop(self.blocks.remove(&place)),
                Command::Adapt(span, adapters) => drop(self.adapters.insert(span, adapters)),
                Command::Admit(sequence, sampler) => drop(self.samplers.insert(sequence, sampler)),
                Command::Release(sequence) => {
                    self.samplers.remove(&sequence);
                    self.tables.remove(&sequence);
                }
                Command::Run(batch, rows) => {
                    let elapsed = batch.strands.iter().map(|strand| self.cost.of(strand.blocks.len(), strand.row_count)).sum();
                    self.commands.push_front(Command::Run(batch, rows));
                    self.running = Some(elapsed);
                    return self.running;
                }
            }
        }
        None
    }

    /// Ends the batch that runs: the batch, the time that it took, what was sampled, what goes down links.
    pub(crate) fn end(&mut self) -> (Box<Batch>, Micros, Vec<Sample>, Vec<LinkRows>) {
        let elapsed = self.running.take().expect("a batch runs");
        let Some(Command::Run(batch, rows)) = self.commands.pop_front() else { panic!("the batch that runs is the first command") };
        let (samples, links) = self.run(&batch, &rows);
        (batch, elapsed, samples, links)
    }

    fn update_tables(&mut self, batch: &Batch) {
        for update in &batch.tables {
            let tables = self.tables.entry(update.sequence).or_default();
            let (from, to) = (update.attention_from as usize, (update.attention_from + update.attention_count) as usize);
            if tables.len() < to {
                tables.resize_with(to, Vec::new);
            }
            for table in &mut tables[from..to] {
                assert!(table.len() >= update.page as usize, "no page is left out");
                table.truncate(update.page as usize);
            }
            for slots in batch.table_in(update) {
                tables[from..to].iter_mut().zip(slots).for_each(|(table, slot)| table.push(*slot));
            }
        }
    }

    fn run(&mut self, batch: &Batch, link_rows: &BTreeMap<SequenceId, Vec<u64>>) -> (Vec<Sample>, Vec<LinkRows>) {
        self.update_tables(batch);
        let resident = |place: &BlockIndex| *self.blocks.get(place).expect("the engine runs resident blocks only");
        let width = resident(&batch.strands[0].blocks[0]).1;
        let mut state: Vec<Vec<u64>> = batch.rows.iter().map(|rows| self.input(batch, rows, width, link_rows)).collect();
        let mut attention = 0;
        for place in 0..batch.strands[0].blocks.len() {
            for strand in &batch.strands {
                let block = resident(&strand.blocks[place]).0;
                let range = strand.rows.start as usize..strand.rows.end as usize;
                for (rows, values) in batch.rows[range.clone()].iter().zip(&mut state[range]) {
                    let adapter = self.adapters[&rows.span][rows.block_from as usize + place];
                    let block = &adapter.map_or(block, |adapter| adapter.change(&block));
                    for (value, position) in values.iter_mut().zip(rows.start..) {
                        *value = through(block, self.class, position, *value);
                    }
                }
            }
            // Blocks of one place are alike.
            let block = resident(&batch.strands[0].blocks[place]).0;
            let Some(kv_heads) = block.kv_heads else { continue };
            // All rows are written before any is read, as on the real device.
            for (rows, values) in batch.rows.iter().zip(&state) {
                let table = &self.tables[&rows.sequence][rows.attention_from as usize + attention];
                for (value, position) in values.iter().zip(rows.start..) {
                    let slot = table[(position / self.page_tokens) as usize];
                    let fresh = || Page { rows: vec![0; self.page_tokens as usize], hashes: vec![0; self.page_tokens as usize] };
                    self.pages.entry((kv_heads, slot)).or_insert_with(fresh).write(position % self.page_tokens, *value);
                }
            }
            for (rows, values) in batch.rows.iter().zip(&mut state) {
                let table = &self.tables[&rows.sequence][rows.attention_from as usize + attention];
                let page = |position: u32| &self.pages[&(kv_heads, table[(position / self.page_tokens) as usize])];
                if let Some(window) = block.window {
                    let row = |position: u32| page(position).rows[(position % self.page_tokens) as usize];
                    for (value, position) in values.iter_mut().zip(rows.start..) {
                        *value = window_hash(((position + 1).saturating_sub(window)..=position).map(row));
                    }
                    continue;
                }
                let hash = |position: u32| page(position).hashes[(position % self.page_tokens) as usize];
                let mut granules = (0..rows.start / GRANULE).fold(0, |all, granule| mix(&[all, hash(granule * GRANULE + GRANULE - 1)]));
                for (value, position) in values.iter_mut().zip(rows.start..) {
                    if position > rows.start && position.is_multiple_of(GRANULE) {
                        granules = mix(&[granules, hash(position - 1)]);
                    }
                    *value = mix(&[granules, hash(position)]);
                }
            }
            attention += 1;
        }
        self.output(batch, width, state)
    }

    fn input(
        &self,
        batch: &Batch,
        rows: &ashlar_executor::state::batch::Rows,
        width: u32,
        link_rows: &BTreeMap<SequenceId, Vec<u64>>,
    ) -> Vec<u64> {
        let domain = || &self.samplers.get(&rows.sequence).expect("admitted before, and no batch follows a release").domain;
        let values: Vec<u64> = match &rows.input {
            RowInput::Tokens(tokens) => batch.tokens_in(tokens).iter().map(|token| embed(domain(), *token)).collect(),
            RowInput::Hidden(slots) => {
                let row = |slot: &u32| *self.hidden.get(&(width, *slot)).expect("hidden rows are written before they are read");
                batch.slots_in(slots).iter().map(row).collect()
            }
            RowInput::Link => link_rows.get(&rows.sequence).expect("the caller attached them").clone(),
            RowInput::Sampled => {
                let latest = self.samplers.get(&rows.sequence).and_then(|sampler| sampler.latest);
                let (position, token) = latest.expect("batches run in order, and none follows a release");
                assert_eq!(position, rows.start, "a row takes the token sampled last");
                vec![embed(domain(), token)]
            }
        };
        assert_eq!(values.len(), rows.count as usize, "a batch says how many rows it has");
        values
    }

    fn output(&mut self, batch: &Batch, width: u32, state: Vec<Vec<u64>>) -> (Vec<Sample>, Vec<LinkRows>) {
        let (mut samples, mut links) = (Vec::new(), Vec::new());
        for (rows, values) in batch.rows.iter().zip(state) {
            let sequence = rows.sequence;
            match &rows.output {
                RowOutput::Hidden(slots) => {
                    self.hidden.extend(batch.slots_in(slots).iter().map(|slot| (width, *slot)).zip(values));
                }
                RowOutput::Link => links.push(LinkRows { sequence, start: rows.start, width, rows: values }),
                RowOutput::Sample(None) => {}
                RowOutput::Sample(Some(position)) => {
                    let sampler = self.samplers.get_mut(&sequence).expect("admitted before, and no batch follows a release");
                    let last = *values.last().expect("at least one row");
                    let token = sample(last, sampler.seed, *position, sampler.history);
                    sampler.history = accept(sampler.history, token);
                    sampler.latest = Some((*position, token));
                    samples.push(Sample {
                        sequence,
                        position: *position,
                        token: Ok(SampledToken { token, logprob: 0.0, top: Vec::new() }),
                    });
                }
            }
        }
        (samples, links)
    }
}

impl Page {
    /// Writes a row, and hashes those of its granule that lie behind it anew.
    fn write(&mut self, offset: u32, value: u64) {
        self.rows[offset as usize] = value;
        let end = (offset / GRANULE + 1) * GRANULE;
        for at in offset..end {
            let before = if at.is_multiple_of(GRANULE) { 0 } else { self.hashes[at as usize - 1] };
            self.hashes[at as usize] = mix(&[before, self.rows[at as usize]]);
        }
    }
}
