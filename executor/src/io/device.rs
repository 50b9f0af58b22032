//! The device thread: owns the blocks, the KV memory, the hidden rows and the samplers, and runs batches in the order
//! given. It knows nothing of routers or time; a broken invariant ends the process (its lease expires, others resume).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ashlar_kernels::ops::{KvPlace, KvShape, Ops, PackError, PageLayout, Query};

use super::adapters::{AdapterIndex, Adapters, SpanAdapters};
use crate::model::adapter::LoadedAdapter;
use crate::model::block::LoadedBlock;
use crate::model::forward::{AttentionBatch, Forward, ForwardBatch, KvPools, Strand};
use crate::model::sampler::Sampler;
use crate::state::batch::{Batch, RowInput, RowOutput, Rows, Sample, SampledToken, SequenceId};
use crate::state::limits::Limits;
use crate::state::segments::BlockIndex;
use crate::state::sequence::SpanIndex;

/// What the device thread is told.
pub enum Command<B: Ops> {
    /// Take a loaded block.
    Load(BlockIndex, Box<LoadedBlock<B>>),
    /// Drop a block.
    Evict(BlockIndex),
    /// Take a loaded adapter.
    LoadAdapter(AdapterIndex, Box<LoadedAdapter<B>>),
    /// Drop an adapter.
    EvictAdapter(AdapterIndex),
    /// From now on the blocks of a span have these adapters.
    Adapt(SpanIndex, SpanAdapters),
    /// A sequence whose tokens will be sampled here.
    Admit(SequenceId, Box<Sampler>),
    /// Forget a sequence.
    Release(SequenceId),
    /// Run a batch. Rows that came over links, by sequence, are at hand in `link_rows`, f32 row after row.
    Run(Batch, Vec<(SequenceId, Vec<f32>)>),
}

/// Hidden rows that leave for another executor.
pub struct LinkRows {
    /// Whose.
    pub sequence: SequenceId,
    /// Position of the first.
    pub start: u32,
    /// Width D.
    pub width: usize,
    /// `[count, D]`.
    pub rows: Vec<f32>,
}

/// A batch's results.
pub struct BatchDone {
    /// The batch, to use its memory again.
    pub batch: Batch,
    /// Tokens sampled.
    pub samples: Vec<Sample>,
    /// Rows for links.
    pub link_rows: Vec<LinkRows>,
    /// Time on the device.
    pub elapsed: Duration,
}

/// What the device thread answers.
pub enum Reply {
    /// A batch ran.
    Done(BatchDone),
    /// A block could not be taken for want of memory.
    LoadFailed(BlockIndex, PackError),
    /// So an adapter.
    LoadAdapterFailed(AdapterIndex, PackError),
}

struct Pools<B: Ops> {
    pages: PageLayout,
    pools: BTreeMap<KvShape, Pool<B>>,
}

/// The pages of one shape.
struct Pool<B: Ops> {
    kv: B::Kv,
    slot_count: usize,
    /// Slots that were touched, from the first on: the order in which the engine gives out those that never were in use.
    touched: usize,
}

impl<B: Ops> Pools<B> {
    /// Touches the next pages of a pool of which less than its share of `bytes_max` is; false where there is none.
    fn touch(&mut self, ops: &B, bytes_max: u64) -> bool {
        let share = (bytes_max / self.pools.len().max(1) as u64) as usize;
        for (shape, pool) in &mut self.pools {
            let slots_max = (share / shape.page_bytes()).min(pool.slot_count);
            if pool.touched < slots_max {
                let end = (pool.touched + (TOUCH_BYTES / shape.page_bytes()).max(1)).min(slots_max);
                ops.touch_kv(&mut pool.kv, pool.touched..end);
                pool.touched = end;
                return true;
            }
        }
        false
    }
}

impl<B: Ops> KvPools<B> for Pools<B> {
    fn pages(&self) -> PageLayout {
        self.pages
    }

    fn pool(&mut self, shape: KvShape) -> &mut B::Kv {
        &mut self.pools.get_mut(&shape).expect("pools are made when a block of the shape is loaded").kv
    }
}

/// Page tables and places of one attention block in one batch; reused from batch to batch.
#[derive(Default)]
struct AttentionScratch {
    places: Vec<KvPlace>,
    queries: Vec<Query>,
    tables: Vec<u32>,
}

/// The page tables of the sequence at one place.
struct Tables {
    sequence: SequenceId,
    /// For each attention block of its span the slots, by page.
    blocks: Vec<Vec<u32>>,
}

/// Who samples for a sequence, and what it sampled last: the input of a row whose token the engine did not know yet.
struct Sampling {
    sampler: Box<Sampler>,
    /// Position and token. The token is 0 where none could be sampled: the sequence fails, and its rows in flight are discarded.
    latest: Option<(u32, u32)>,
}

/// State of the device thread.
struct Device<B: Ops> {
    ops: Arc<B>,
    limits: Limits,
    forward: Forward<B>,
    blocks: Vec<Option<Box<LoadedBlock<B>>>>,
    adapters: Adapters<B>,
    pools: Pools<B>,
    /// Hidden rows between segments, by width; slots are those of the engine.
    hidden: BTreeMap<usize, B::Buffer>,
    samplers: BTreeMap<SequenceId, Sampling>,
    /// Page tables, by the place of their sequence.
    tables: Vec<Option<Tables>>,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    index: Vec<u32>,
    logit_rows: Vec<u32>,
    /// Where the logits of each of them are largest, if anybody asks.
    largest: Vec<Option<u32>>,
    attention: Vec<AttentionScratch>,
}

/// Starts the device thread. It ends when the sender of commands is dropped.
///
/// # Errors
/// When the device has no memory for its workspace, or the thread cannot start.
pub fn start<B: Ops>(
    ops: Arc<B>,
    limits: Limits,
    replies: impl Fn(Reply) + Send + 'static,
) -> Result<mpsc::Sender<Command<B>>, Box<dyn std::error::Error + Send + Sync>> {
    let (commands, receiver) = mpsc::channel();
    let forward = Forward::new(Arc::clone(&ops), limits.step_tokens_max as usize, limits.sequences_max as usize)?;
    let pools = Pools { pages: limits.pages(), pools: BTreeMap::new() };
    let device = Device {
        ops,
        forward,
        blocks: Vec::new(),
        adapters: Adapters::default(),
        pools,
        hidden: BTreeMap::new(),
        samplers: BTreeMap::new(),
        tables: Vec::new(),
        tokens: Vec::new(),
        positions: Vec::new(),
        index: Vec::new(),
        logit_rows: Vec::new(),
        largest: Vec::new(),
        attention: Vec::new(),
        limits,
    };
    std::thread::Builder::new().name("device".to_owned()).spawn(move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || device.serve(&receiver, &replies)));
        if let Err(panic) = outcome {
            // A broken invariant, or a card that failed: nothing here can be trusted any more. Where it was, the panic's hook printed.
            let what = panic.downcast_ref::<String>().map_or_else(|| panic.downcast_ref::<&str>().copied().unwrap_or("?"), String::as_str);
            tracing::error!("the device thread failed, and ends the process: {what}");
            std::process::abort();
        }
    })?;
    Ok(commands)
}

impl<B: Ops> Device<B> {
    fn serve(mut self, commands: &mpsc::Receiver<Command<B>>, reply: &impl Fn(Reply)) {
        while let Some(command) = self.next(commands) {
            match command {
                Command::Load(index, block) => {
                    if let Err(error) = self.load(index, block) {
                        reply(Reply::LoadFailed(index, error));
                    }
                }
                Command::Evict(index) => self.blocks[index.0 as usize] = None,
                Command::LoadAdapter(index, adapter) => match self.forward.reserve_adapter(&adapter) {
                    Ok(()) => self.adapters.load(index, adapter),
                    Err(error) => reply(Reply::LoadAdapterFailed(index, error)),
                },
                Command::EvictAdapter(index) => self.adapters.evict(index),
                Command::Adapt(span, adapters) => self.adapters.adapt(span, adapters),
                Command::Admit(sequence, sampler) => {
                    self.samplers.insert(sequence, Sampling { sampler, latest: None });
                }
                Command::Release(sequence) => {
                    self.samplers.remove(&sequence);
                    if let Some(tables) = self.tables.get_mut(sequence.place()) {
                        tables.take_if(|tables| tables.sequence == sequence);
                    }
                }
                Command::Run(batch, link_rows) => {
                    #[expect(clippy::disallowed_methods, reason = "the device thread measures its own steps")]
                    let began = std::time::Instant::now();
                    let (samples, link_rows) = self.run(&batch, &link_rows);
                    reply(Reply::Done(BatchDone { batch, samples, link_rows, elapsed: began.elapsed() }));
                }
            }
        }
    }

    /// The next command; None when nobody can send any more. Between, where none comes, pages get their memory, and then the device
    /// rests once.
    fn next(&mut self, commands: &mpsc::Receiver<Command<B>>) -> Option<Command<B>> {
        loop {
            match commands.recv_timeout(TOUCH_AFTER) {
                Ok(command) => return Some(command),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) if self.pools.touch(&self.ops, self.limits.kv_touch_bytes) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => break,
            }
        }
        match commands.recv_timeout(REST_AFTER) {
            Ok(command) => Some(command),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.ops.rest();
                commands.recv().ok()
            }
        }
    }

    fn load(&mut self, index: BlockIndex, block: Box<LoadedBlock<B>>) -> Result<(), PackError> {
        let place = index.0 as usize;
        self.forward.reserve(&block)?;
        if let Some(shape) = block.kv_shape(self.pools.pages)
            && !self.pools.pools.contains_key(&shape)
        {
            let slot_bytes = shape.page_bytes() as u64;
            let slot_count = (self.limits.kv_bytes / slot_bytes) as usize;
            let kv = self.ops.kv(shape, slot_count)?;
            self.pools.pools.insert(shape, Pool { kv, slot_count, touched: 0 });
        }
        for width in [block.width(), block.output_width()] {
            if !self.hidden.contains_key(&width) {
                let buffer = self.ops.buffer(self.limits.hidden_slots(width as u32) * width)?;
                self.hidden.insert(width, buffer);
            }
        }
        if self.blocks.len() <= place {
            self.blocks.resize_with(place + 1, || None);
        }
        self.blocks[place] = Some(block);
        Ok(())
    }

    /// Appends to page tables what a batch brings.
    fn update_tables(&mut self, batch: &Batch) {
        for update in &batch.tables {
            let place = update.sequence.place();
            if self.tables.len() <= place {
                self.tables.resize_with(place + 1, || None);
            }
            let fresh = || Tables { sequence: update.sequence, blocks: Vec::new() };
            let tables = self.tables[place].get_or_insert_with(fresh);
            if tables.sequence != update.sequence {
                *tables = fresh();
            }
            let (from, to) = (update.attention_from as usize, (update.attention_from + update.attention_count) as usize);
            if tables.blocks.len() < to {
                tables.blocks.resize_with(to, Vec::new);
            }
            for block in &mut tables.blocks[from..to] {
                assert!(block.len() >= update.page as usize, "no page is left out");
                block.truncate(update.page as usize);
            }
            for slots in batch.table_in(update) {
                tables.blocks[from..to].iter_mut().zip(slots).for_each(|(block, slot)| block.push(*slot));
            }
        }
    }

    fn run(&mut self, batch: &Batch, link_rows: &[(SequenceId, Vec<f32>)]) -> (Vec<Sample>, Vec<LinkRows>) {
        self.update_tables(batch);
        let resident = |index: &BlockIndex| self.blocks[index.0 as usize].as_deref().expect("the engine runs resident blocks only");
        let chains: Vec<Vec<&LoadedBlock<B>>> = batch.strands.iter().map(|strand| strand.blocks.iter().map(resident).collect()).collect();
        let blocks = chains[0].as_slice();
        let (width_in, width_out) = (blocks[0].width(), blocks.last().expect("a strand has blocks").output_width());
        // Rows that stay come first, so that one scatter takes them from a dense prefix; then those of one strand are together, and in it those
        // with the same adapters.
        let mut order: Vec<(usize, &Rows)> =
            batch.strands().enumerate().flat_map(|(number, (_, rows))| rows.iter().map(move |rows| (number, rows))).collect();
        order.sort_by_key(|(strand, rows)| (!matches!(rows.output, RowOutput::Hidden(_)), *strand, self.adapters.key(rows)));
        let (mut strands, mut latest, mut end): (Vec<Strand<'_, B>>, _, _) = (Vec::new(), None, 0);
        for (number, rows) in &order {
            let begin = end;
            end += rows.count as usize;
            match strands.last_mut().filter(|_| latest == Some(*number)) {
                Some(strand) => strand.rows.end = end,
                None => strands.push(Strand { rows: begin..end, blocks: &chains[*number] }),
            }
            latest = Some(*number);
        }
        let order: Vec<&Rows> = order.into_iter().map(|(_, rows)| rows).collect();
        let row_count = batch.row_count as usize;

        self.tokens.clear();
        self.positions.clear();
        self.index.clear();
        self.logit_rows.clear();
        for rows in &order {
            self.positions.extend(rows.start..rows.start + rows.count);
            match &rows.input {
                RowInput::Tokens(tokens) => self.tokens.extend_from_slice(batch.tokens_in(tokens)),
                RowInput::Sampled => {
                    let latest = self.samplers.get(&rows.sequence).and_then(|sampling| sampling.latest);
                    let (position, token) = latest.expect("batches run in order, and none follows a release");
                    assert_eq!(position, rows.start, "a row takes the token sampled last");
                    self.tokens.push(token);
                }
                RowInput::Hidden(slots) => self.index.extend_from_slice(batch.slots_in(slots)),
                // Any slot will do: the rows are uploaded over it.
                RowInput::Link => self.index.extend(std::iter::repeat_n(0, rows.count as usize)),
            }
            if let RowOutput::Sample(Some(_)) = rows.output {
                self.logit_rows.push(self.positions.len() as u32 - 1);
            }
        }
        if !blocks[0].is_embed() {
            let hidden = &self.hidden[&width_in];
            self.ops.gather_rows(self.forward.hidden_mut(), hidden, &self.index, width_in);
            let mut at = 0;
            for rows in &order {
                if matches!(rows.input, RowInput::Link) {
                    let (_, values) = link_rows.iter().find(|(id, _)| *id == rows.sequence).expect("the caller attached them");
                    self.ops.upload(self.forward.hidden_mut(), at * width_in, values);
                }
                at += rows.count as usize;
            }
        }

        let page_tokens = self.limits.page_tokens;
        let attention_count = blocks.iter().filter(|block| block.kv_shape(self.pools.pages).is_some()).count();
        if self.attention.len() < attention_count {
            self.attention.resize_with(attention_count, AttentionScratch::default);
        }
        for (i, scratch) in self.attention[..attention_count].iter_mut().enumerate() {
            scratch.places.clear();
            scratch.queries.clear();
            scratch.tables.clear();
            for rows in &order {
                let table_start = scratch.tables.len() as u32;
                let tables = self.tables[rows.sequence.place()].as_ref().expect("a batch brings the pages that it needs");
                let table = &tables.blocks[rows.attention_from as usize + i];
                scratch.tables.extend_from_slice(table);
                for position in rows.start..rows.start + rows.count {
                    let slot = table[(position / page_tokens) as usize];
                    scratch.places.push(KvPlace { slot, offset: position % page_tokens });
                    scratch.queries.push(Query { table_start, position });
                }
            }
        }
        let attention: Vec<AttentionBatch<'_>> = self.attention[..attention_count]
            .iter()
            .map(|s| AttentionBatch { places: &s.places, queries: &s.queries, tables: &s.tables })
            .collect();
        let forward_batch = ForwardBatch {
            row_count,
            tokens: &self.tokens,
            positions: &self.positions,
            attention: &attention,
            logit_rows: &self.logit_rows,
        };
        let adapters = self.adapters.runs(&order, blocks.len());
        self.forward.run_abreast(&strands, &adapters, &forward_batch, &mut self.pools);

        // Tokens of one row after another would leave all threads but this one without work.
        let takes_largest = |rows: &&Rows| match rows.output {
            RowOutput::Sample(Some(_)) => self.samplers.get(&rows.sequence).is_some_and(|sampling| sampling.sampler.takes_largest()),
            _ => false,
        };
        if order.iter().any(takes_largest) {
            self.forward.largest_logits(&mut self.largest);
        }

        self.index.clear();
        let mut link_out = Vec::new();
        let mut samples = Vec::new();
        let (mut at, mut logit_row) = (0, 0);
        for rows in &order {
            match &rows.output {
                RowOutput::Hidden(slots) => self.index.extend_from_slice(batch.slots_in(slots)),
                RowOutput::Link => {
                    let mut values = vec![0.0; rows.count as usize * width_out];
                    self.ops.download(self.forward.hidden(), at * width_out, &mut values);
                    link_out.push(LinkRows { sequence: rows.sequence, start: rows.start, width: width_out, rows: values });
                }
                RowOutput::Sample(None) => {}
                RowOutput::Sample(Some(position)) => {
                    let sampling = self.samplers.get_mut(&rows.sequence).expect("admitted before, and no batch follows a release");
                    let sampled = match sampling.sampler.takes_largest() {
                        true => sampling.sampler.sample_largest(self.largest[logit_row], self.forward.vocab()),
                        false => sampling.sampler.sample(self.forward.logits(logit_row), *position),
                    };
                    let token = match sampled {
                        Ok(sampled) => {
                            sampling.sampler.accept(sampled.token);
                            Ok(SampledToken { token: sampled.token, logprob: sampled.logprob, top: sampled.top })
                        }
                        Err(error) => Err(error.to_string()),
                    };
                    sampling.latest = Some((*position, token.as_ref().map_or(0, |sampled| sampled.token)));
                    samples.push(Sample { sequence: rows.sequence, position: *position, token });
                    logit_row += 1;
                }
            }
            at += rows.count as usize;
        }
        if !self.index.is_empty() {
            let hidden = self.hidden.get_mut(&width_out).expect("made when the block was loaded");
            self.ops.scatter_rows(hidden, &self.index, self.forward.hidden(), width_out);
        }
        self.ops.submit();
        (samples, link_out)
    }
}

/// KV memory that is touched at a time, the system's large page: a command that comes meanwhile waits for it, 8 ms at worst where seen.
const TOUCH_BYTES: usize = 2 << 20;
/// Without a command for so long, pages get their memory: between two batches of a busy device it is less.
const TOUCH_AFTER: Duration = Duration::from_millis(2);
/// Without a command for so long after that, the device is idle.
const REST_AFTER: Duration = Duration::from_millis(500);
