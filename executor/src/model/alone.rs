//! One sequence, alone, the plain way: a chain from the zoo, its own KV pages, prompts in chunks of a chosen size. Tests
//! compare the engine with it, and it with other implementations. No scheduling, no sharing, no sampling but greedy.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ashlar_kernels::ops::{KvFormat, KvPlace, KvShape, Ops, PackError, PageLayout, Query};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::joint::{self, Joint};
use ashlar_zoo::roles::ManifestError;
use ashlar_zoo::store::{StoreError, Zoo};

use super::adapter::LoadedAdapter;
use super::block::LoadedBlock;
use super::forward::{AdapterRun, AttentionBatch, Forward, ForwardBatch, KvPools};
use super::load::LoadError;
use super::outputs::{Outputs, total_bytes};

/// Why a chain could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// The zoo failed.
    #[error("read the chain from the zoo")]
    Store(#[from] StoreError),
    /// A block failed.
    #[error("load block {index}")]
    Load {
        /// Its place in the chain.
        index: usize,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// An adapter failed.
    #[error("load the adapter of block {index}")]
    Adapter {
        /// The block's place in the chain.
        index: usize,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// Blocks that do not fit each other.
    #[error("put the chain together")]
    Chain(#[from] ManifestError),
    /// The device has no room.
    #[error("set up the device")]
    Device(#[from] PackError),
}

/// How much one sequence may take.
#[derive(Debug, Clone, Copy)]
pub struct AloneLimits {
    /// Longest chunk, in tokens.
    pub chunk_tokens_max: usize,
    /// Longest sequence, in tokens.
    pub tokens_max: usize,
    /// Tokens of a KV page.
    pub page_tokens: usize,
    /// How keys and values are stored.
    pub kv_format: KvFormat,
}

impl AloneLimits {
    pub(super) fn pages(&self) -> PageLayout {
        PageLayout { tokens: self.page_tokens, format: self.kv_format }
    }
}

/// A chain and one sequence in it.
pub struct Alone<B: Ops> {
    ops: Arc<B>,
    blocks: Vec<LoadedBlock<B>>,
    /// Those of the chain, by the block that each changes, ascending.
    adapters: Vec<(usize, LoadedAdapter<B>)>,
    forward: Forward<B>,
    pools: Pools<B>,
    /// Page table of each attention block.
    tables: Vec<Vec<u32>>,
    limits: AloneLimits,
    /// Tokens whose KV is in the pages.
    computed_tokens: usize,
    /// Blocks of each run; more than one cuts the chain, hidden states crossing as f32 on the host.
    cuts: Vec<usize>,
}

impl<B: Ops> Alone<B> {
    /// Loads all blocks of a chain onto the device.
    ///
    /// # Errors
    /// When the zoo, a block or the device fails.
    pub async fn load(ops: Arc<B>, zoo: &Zoo, chain: Digest, limits: AloneLimits) -> Result<Self, AloneError> {
        let (blocks, adapters) = (load_chain(&*ops, zoo, chain).await?, load_adapters(&*ops, zoo, chain).await?);
        Ok(Self::new(ops, blocks, limits)?.adapted(adapters)?)
    }

    /// Sets up a chain whose blocks are loaded: embed first, head last. Without a head it has [`Alone::hidden`] only.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(ops: Arc<B>, blocks: Vec<LoadedBlock<B>>, limits: AloneLimits) -> Result<Self, PackError> {
        let mut forward = Forward::new(Arc::clone(&ops), limits.chunk_tokens_max, limits.chunk_tokens_max)?;
        blocks.iter().try_for_each(|block| forward.reserve(block))?;
        let (pools, tables) = Pools::new(&*ops, &blocks, limits)?;
        let cuts = vec![blocks.len()];
        Ok(Self { ops, blocks, adapters: Vec::new(), forward, pools, tables, limits, computed_tokens: 0, cuts })
    }

    /// The same chain, changed by adapters: each with the place of its block, ascending.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn adapted(mut self, adapters: Vec<(usize, LoadedAdapter<B>)>) -> Result<Self, PackError> {
        adapters.iter().try_for_each(|(_, adapter)| self.forward.reserve_adapter(adapter))?;
        self.adapters = adapters;
        Ok(self)
    }

    /// Blocks of the chain.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes of weights on the device, adapters included.
    pub fn weight_bytes(&self) -> usize {
        let adapters: usize = self.adapters.iter().map(|(_, adapter)| adapter.bytes()).sum();
        total_bytes(self.blocks.iter().map(LoadedBlock::weights)) as usize + adapters
    }

    /// Logits of a row.
    pub fn vocab(&self) -> usize {
        self.blocks.last().and_then(LoadedBlock::vocab).expect("a head is last")
    }

    /// Puts another block of the same shape into a place of the chain, and gives back the one that was there.
    ///
    /// # Errors
    /// When the device has no room for what the block needs while it runs; then the chain is as it was.
    ///
    /// # Panics
    /// When there is no such place, or keys and values of the two have not the same shape.
    pub fn exchange(&mut self, index: usize, block: LoadedBlock<B>) -> Result<LoadedBlock<B>, PackError> {
        let shape = |block: &LoadedBlock<B>| block.kv_shape(self.limits.pages());
        assert_eq!(shape(&self.blocks[index]), shape(&block), "pages are laid out for the block that was there");
        self.forward.reserve(&block)?;
        Ok(std::mem::replace(&mut self.blocks[index], block))
    }

    /// From now on runs blocks `[0, at)` and `[at, ..)` apart, as two executors would; `at == 0` runs all at once.
    pub fn cut_at(&mut self, at: usize) {
        assert!(at < self.blocks.len(), "a cut leaves blocks on both sides");
        self.cuts = if at == 0 { vec![self.blocks.len()] } else { vec![at, self.blocks.len()] };
    }

    /// Forgets the sequence. Pages keep what they hold, so a read of a stale key would show.
    pub fn restart(&mut self) {
        self.computed_tokens = 0;
    }

    /// Appends `tokens`, at most `chunk` at a time, and returns the logits `[vocab]` of the last `logit_rows` of them.
    pub fn feed(&mut self, tokens: &[u32], chunk: usize, logit_rows: usize) -> Vec<Vec<f32>> {
        let wanted_from = tokens.len() - logit_rows;
        let mut logits = Vec::with_capacity(logit_rows);
        for (index, part) in tokens.chunks(chunk).enumerate() {
            let at = index * chunk;
            let wanted: Vec<u32> = (0..part.len() as u32).filter(|row| at + *row as usize >= wanted_from).collect();
            self.step(part, &wanted);
            logits.extend((0..wanted.len()).map(|row| self.forward.logits(row).to_vec()));
        }
        logits
    }

    /// Forgets the sequence, feeds `tokens`, at most `chunk` at a time, and returns the hidden rows `[T, D]` behind the last block.
    ///
    /// # Panics
    /// When that is a head.
    pub fn hidden(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let last = self.blocks.last().expect("a chain has blocks");
        assert!(!last.is_head(), "behind a head there are logits");
        let width = last.output_width();
        self.restart();
        let mut rows = vec![0.0; tokens.len() * width];
        for (tokens, rows) in std::iter::zip(tokens.chunks(chunk), rows.chunks_mut(chunk * width)) {
            self.step(tokens, &[]);
            self.ops.download(self.forward.hidden(), 0, rows);
        }
        rows
    }

    /// Feeds a prompt and then its greedy continuation. Row i is what token i was chosen from.
    pub fn greedy(&mut self, prompt: &[u32], token_count: usize, chunk: usize) -> Greedy {
        self.restart();
        let mut greedy = Greedy { tokens: Vec::new(), rows: Vec::new() };
        let mut rows = self.feed(prompt, chunk, 1);
        loop {
            let row = rows.pop().expect("one row was asked for");
            greedy.tokens.push(argmax(&row));
            greedy.rows.push(row);
            if greedy.tokens.len() == token_count {
                return greedy;
            }
            rows = self.feed(&greedy.tokens[greedy.tokens.len() - 1..], chunk, 1);
        }
    }

    fn step(&mut self, tokens: &[u32], logit_rows: &[u32]) {
        let (start, end) = (self.computed_tokens, self.computed_tokens + tokens.len());
        assert!(end <= self.limits.tokens_max, "{end} tokens, at most {}", self.limits.tokens_max);
        let rows = Rows::at(start..end, &self.tables, self.limits.page_tokens);
        let attention = rows.attention(&self.tables);

        let (mut from, mut attention_from) = (0, 0);
        for to in self.cuts.clone() {
            if from > 0 {
                cross(&*self.ops, &mut self.forward, tokens.len() * self.blocks[from].width());
            }
            let blocks: Vec<&LoadedBlock<B>> = self.blocks[from..to].iter().collect();
            let attention_to = attention_from + blocks.iter().filter(|block| block.kv_shape(self.limits.pages()).is_some()).count();
            let batch = ForwardBatch {
                row_count: tokens.len(),
                tokens,
                positions: &rows.positions,
                attention: &attention[attention_from..attention_to],
                logit_rows,
            };
            let within = self.adapters.iter().filter(|(block, _)| (from..to).contains(block));
            let adapters: Vec<AdapterRun<'_, B>> =
                within.map(|(block, adapter)| AdapterRun { block: block - from, rows: 0..tokens.len(), adapter }).collect();
            self.forward.run(&blocks, &adapters, &batch, &mut self.pools);
            (from, attention_from) = (to, attention_to);
        }
        self.computed_tokens = end;
    }
}

/// Loads all blocks of a chain onto a device, and nothing else is there.
///
/// # Errors
/// When the zoo or a block fails, or blocks do not fit each other.
pub async fn load_chain<B: Ops>(ops: &B, zoo: &Zoo, chain: Digest) -> Result<Vec<LoadedBlock<B>>, AloneError> {
    let blocks = zoo.read_chain(chain).await?.blocks;
    load_of(ops, zoo, &blocks, blocks.len()).await
}

/// Loads the blocks with which a chain begins, its head not among them, and nothing else is there.
///
/// # Errors
/// When the zoo or a block fails, or blocks do not fit each other.
pub async fn load_beginning<B: Ops>(ops: &B, zoo: &Zoo, digests: &[Digest]) -> Result<Vec<LoadedBlock<B>>, AloneError> {
    load_of(ops, zoo, digests, usize::MAX).await
}

/// The first blocks of a chain of so many.
async fn load_of<B: Ops>(ops: &B, zoo: &Zoo, digests: &[Digest], count: usize) -> Result<Vec<LoadedBlock<B>>, AloneError> {
    let (outputs, mut blocks, mut joints) = (Outputs::default(), Vec::new(), Vec::new());
    // The head first: a token table of the same tensor is read out of it.
    for (index, digest) in digests.iter().enumerate().rev() {
        let mapped = zoo.map_block(*digest).await?;
        joints.push(Joint::of(&mapped.block));
        let block = LoadedBlock::load(ops, &mapped.block, &mapped, &outputs).map_err(|source| AloneError::Load { index, source })?;
        blocks.push(block);
    }
    blocks.reverse();
    joint::check(0, count, joints.into_iter().rev())?;
    Ok(blocks)
}

/// Loads the adapters of a chain, each with the place of its block.
///
/// # Errors
/// When the zoo or an adapter fails.
pub async fn load_adapters<B: Ops>(ops: &B, zoo: &Zoo, chain: Digest) -> Result<Vec<(usize, LoadedAdapter<B>)>, AloneError> {
    let (chain, mut adapters) = (zoo.read_chain(chain).await?, Vec::new());
    for adapter in &chain.adapters {
        let (index, mapped) = (adapter.block_index as usize, zoo.map_adapter(adapter.digest).await?);
        let block = zoo.read_block(chain.blocks[index]).await?;
        let loaded = LoadedAdapter::load(ops, &block, &mapped.adapter, &mapped);
        adapters.push((index, loaded.map_err(|source| AloneError::Adapter { index, source })?));
    }
    Ok(adapters)
}

/// Takes the hidden rows to the host and back, as a link between executors does.
fn cross<B: Ops>(ops: &B, forward: &mut Forward<B>, element_count: usize) {
    let mut rows = vec![0f32; element_count];
    ops.download(forward.hidden(), 0, &mut rows);
    ops.upload(forward.hidden_mut(), 0, &vec![f32::NAN; element_count]);
    ops.upload(forward.hidden_mut(), 0, &rows);
}

/// Rows of one sequence, one after another.
pub(super) struct Rows {
    pub(super) positions: Vec<u32>,
    queries: Vec<Query>,
    /// Where keys and values of each attention block's rows lie.
    places: Vec<Vec<KvPlace>>,
}

impl Rows {
    /// Those at some positions; `tables` has the page table of each attention block.
    pub(super) fn at(positions: Range<usize>, tables: &[Vec<u32>], page_tokens: usize) -> Self {
        let (positions, page): (Vec<u32>, u32) = ((positions.start as u32..positions.end as u32).collect(), page_tokens as u32);
        let place = |table: &[u32], position: u32| KvPlace { slot: table[(position / page) as usize], offset: position % page };
        Self {
            queries: positions.iter().map(|position| Query { table_start: 0, position: *position }).collect(),
            places: tables.iter().map(|table| positions.iter().map(|p| place(table, *p)).collect()).collect(),
            positions,
        }
    }

    /// The same to each attention block.
    pub(super) fn attention<'a>(&'a self, tables: &'a [Vec<u32>]) -> Vec<AttentionBatch<'a>> {
        std::iter::zip(&self.places, tables).map(|(places, tables)| AttentionBatch { places, queries: &self.queries, tables }).collect()
    }
}

/// What [`Alone::greedy`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Greedy {
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// The logits `[vocab]` that each was chosen from.
    pub rows: Vec<Vec<f32>>,
}

/// One pool for each KV shape of the chain.
pub(super) struct Pools<B: Ops> {
    pages: PageLayout,
    pools: BTreeMap<KvShape, B::Kv>,
}

impl<B: Ops> Pools<B> {
    /// Pools, and the page table of each attention block: slots in descending order, so that nothing can lean on their order.
    pub(super) fn new(ops: &B, blocks: &[LoadedBlock<B>], limits: AloneLimits) -> Result<(Self, Vec<Vec<u32>>), PackError> {
        let page_count = limits.tokens_max.div_ceil(limits.page_tokens) as u32;
        let shapes: Vec<KvShape> = blocks.iter().filter_map(|block| block.kv_shape(limits.pages())).collect();
        let mut slot_counts: BTreeMap<KvShape, u32> = BTreeMap::new();
        let tables = shapes
            .iter()
            .map(|shape| {
                let slots = slot_counts.entry(*shape).or_insert(0);
                *slots += page_count;
                (*slots - page_count..*slots).rev().collect()
            })
            .collect();
        let pools =
            slot_counts.into_iter().map(|(shape, slots)| Ok((shape, ops.kv(shape, slots as usize)?))).collect::<Result<_, PackError>>()?;
        Ok((Self { pages: limits.pages(), pools }, tables))
    }
}

impl<B: Ops> KvPools<B> for Pools<B> {
    fn pages(&self) -> PageLayout {
        self.pages
    }

    fn pool(&mut self, shape: KvShape) -> &mut B::Kv {
        self.pools.get_mut(&shape).expect("made for every attention block")
    }
}

fn argmax(row: &[f32]) -> u32 {
    let better = |best: usize, index: usize| if row[index] > row[best] { index } else { best };
    (0..row.len()).reduce(better).expect("a vocabulary is not empty") as u32
}
