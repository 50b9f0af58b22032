//! Which tensors of an adapter change which matrices of the base: every name matched, every shape and rank checked against
//! configuration and base, before a byte is hashed. A module that ingest split (`qkv_proj`, `c_attn`) gives each part the same A
//! and its own rows of B, which is exact.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_kernels::format::Dtype;

use super::base::Base;
use super::complete::{self, Contents};
use super::error::PeftError;
use super::keys::{self, Factor, Key, Site, Sites};
use crate::adapter::{ADAPTED_ROLES, RANK_MAX, is_believed};
use crate::family::ConfigError;
use crate::family::names::{Piece, Rows};
use crate::family::peft::LoraConfig;
use crate::formats::{ElementType, TensorEntry, TensorFiles};
use crate::ingest::IngestError;
use crate::ingest::plan::{TensorPlan, target_shape};
use crate::manifest::{Block, BlockKind, Norm};
use crate::roles::RoleShape;

/// An adapter, planned.
#[derive(Debug, Default)]
pub(super) struct AdapterPlan {
    /// All tensors of the file, in pieces.
    pub(super) tensors: Vec<TensorPlan>,
    /// By block and role.
    pub(super) changes: BTreeMap<usize, BTreeMap<&'static str, ChangePlan>>,
    /// Tensors that take the place of the base's: index by block and role.
    pub(super) replaced: BTreeMap<(usize, &'static str), usize>,
    pub(super) notes: Vec<String>,
}

/// A change; factors by index into the plan's tensors.
#[derive(Debug)]
pub(super) struct ChangePlan {
    pub(super) scale: f32,
    pub(super) a: usize,
    pub(super) b: usize,
}

impl AdapterPlan {
    /// Tensors that are stored: not those of changes that are zero.
    pub(super) fn used(&self) -> BTreeSet<usize> {
        let factors = self.changes.values().flat_map(BTreeMap::values).flat_map(|change| [change.a, change.b]);
        factors.chain(self.replaced.values().copied()).collect()
    }
}

struct Planner<'a> {
    files: &'a TensorFiles,
    config: &'a LoraConfig,
    base: &'a Base,
    plan: AdapterPlan,
    /// The tensor that changes or replaces a matrix.
    taken: BTreeMap<(usize, &'static str), String>,
}

/// Plans the tensors of `files` over `base`.
pub(super) fn plan(files: &TensorFiles, config: &LoraConfig, base: &Base) -> Result<AdapterPlan, IngestError> {
    let unknown = || IngestError::AdapterConfig(ConfigError::Architecture(base.chain.architecture.clone()));
    let sites = Sites::of(base).ok_or_else(unknown)?;
    let mut planner = Planner { files, config, base, plan: AdapterPlan::default(), taken: BTreeMap::new() };
    let mut contents = Contents::default();
    let (mut pairs, mut ignored): (BTreeMap<String, BTreeMap<Factor, &str>>, usize) = (BTreeMap::new(), 0);
    for name in files.names() {
        let key = keys::parse(name)?;
        let (Key::Factor { module: path, .. } | Key::Whole(path)) = &key;
        if sites.ignores(path) {
            ignored += 1;
            continue;
        }
        match key {
            Key::Whole(path) => {
                planner.whole(name, &path, sites.get(&path))?;
                contents.whole.insert(path);
            }
            Key::Factor { module, factor } => {
                if let Some(other) = pairs.entry(module).or_default().insert(factor, name) {
                    return Err(PeftError::Twice { name: name.to_owned(), other: other.to_owned() }.into());
                }
            }
        }
    }
    let mut zero = 0;
    for (module, pair) in &pairs {
        let half = |there: &str, missing: Factor| PeftError::Half { name: there.to_owned(), missing: missing.name() };
        let (a, b) = match (pair.get(&Factor::A), pair.get(&Factor::B)) {
            (Some(a), Some(b)) => (*a, *b),
            (Some(a), None) => return Err(half(a, Factor::B).into()),
            (None, b) => return Err(half(b.expect("a pair has one at least"), Factor::A).into()),
        };
        zero += planner.low_rank(module, a, b, sites.get(&format!("{module}.weight")))?;
    }
    let mut plan = planner.plan;
    contents.factors = pairs.into_keys().collect();
    plan.notes = complete::check(&contents, config, &sites)?;
    if ignored > 0 {
        plan.notes.push(format!("{ignored} tensors of parts that are not served were left out"));
    }
    if zero > 0 {
        plan.notes.push(format!("{zero} changes are zero and were left out"));
    }
    Ok(plan)
}

impl Planner<'_> {
    /// Plans the factors of a module. Returns how many of its changes are zero, which changes nothing, so that blocks that they
    /// would lie on stay the base's own.
    fn low_rank(&mut self, module: &str, a: &str, b: &str, sites: &[Site]) -> Result<usize, IngestError> {
        let named = |what| PeftError::NotAdapted { name: a.to_owned(), what };
        match sites.first().map(|site| site.role) {
            None => return Err(self.no_module(a, module)),
            Some("token.weight" | "position.weight") => return Err(named("embedding").into()),
            Some("output.weight") => return Err(named("output projection").into()),
            Some(role) if !ADAPTED_ROLES.contains(&role) => return Err(named("norm").into()),
            Some(_) if !self.config.targets(module) => return Err(PeftError::Untargeted(a.to_owned()).into()),
            Some(_) => {}
        }
        let (rank, scale) = (self.config.rank(module), self.config.scale(module));
        if !is_believed(scale) {
            return Err(PeftError::Scale { name: a.to_owned(), scale }.into());
        }
        let (cols, rows) = inputs_outputs(&sites[0]);
        let (a_shape, b_shape) = (self.matrix(a)?, self.matrix(b)?);
        for (name, shape, at, expected) in [(a, a_shape, 0, [u64::from(rank), cols]), (b, b_shape, 1, [rows, u64::from(rank)])] {
            if shape[1 - at] == expected[1 - at] && shape[at] != expected[at] {
                return Err(PeftError::Rank { name: name.to_owned(), actual: shape[at], expected: rank }.into());
            }
            self.same_shape(name, &shape, &expected)?;
        }
        if u64::from(rank) > RANK_MAX {
            return Err(PeftError::RankMax { name: a.to_owned(), rank: u64::from(rank) }.into());
        }
        let (a_zero, a_index) = (self.is_zero(a, Rows::All) || scale == 0.0, self.push(a, Rows::All)?);
        let mut zero = 0;
        for site in sites {
            self.take(a, site)?;
            let b_index = self.push(b, site.piece.rows)?;
            if a_zero || self.is_zero(b, site.piece.rows) {
                zero += 1;
                continue;
            }
            self.plan.changes.entry(site.block).or_default().insert(site.role, ChangePlan { scale, a: a_index, b: b_index });
        }
        Ok(zero)
    }

    /// Plans a whole tensor in place of the base's.
    fn whole(&mut self, name: &str, path: &str, sites: &[Site]) -> Result<(), IngestError> {
        let (module, kind) = path.rsplit_once('.').unwrap_or((path, ""));
        let named = self.config.saves(module) || (kind == "bias" && self.config.biases);
        if !named {
            return Err(PeftError::Unlisted(name.to_owned()).into());
        }
        if sites.is_empty() {
            return Err(self.no_module(name, path));
        }
        let entry = self.entry(name)?.clone();
        let source = self.float(name, &entry)?;
        for site in sites {
            let block = &self.base.blocks[site.block];
            if is_gguf_norm(&self.base.chain.architecture, site.role, block) {
                return Err(PeftError::GgufNorm { name: name.to_owned(), base: self.base.id.to_string() }.into());
            }
            self.take(name, site)?;
            let expected = &block.tensors[site.role].shape;
            let shape = target_shape(&site.piece, &entry.shape).filter(|shape| shape == expected);
            let Some(shape) = shape else {
                let expected = checkpoint_shape(&site.piece, expected);
                return Err(self.other_shape(name, &entry.shape, expected));
            };
            let piece = Piece { name: name.to_owned(), ..site.piece.clone() };
            let planned = TensorPlan { piece, matrix: None, source, source_shape: entry.shape.clone(), target: source, shape };
            self.plan.tensors.push(planned);
            self.plan.replaced.insert((site.block, site.role), self.plan.tensors.len() - 1);
        }
        Ok(())
    }

    fn push(&mut self, name: &str, rows: Rows) -> Result<usize, IngestError> {
        let entry = self.entry(name)?.clone();
        let source = self.float(name, &entry)?;
        let piece = Piece { name: name.to_owned(), transposed: false, rows };
        let shape = target_shape(&piece, &entry.shape).expect("its shape was checked");
        self.plan.tensors.push(TensorPlan { piece, matrix: None, source, source_shape: entry.shape, target: source, shape });
        Ok(self.plan.tensors.len() - 1)
    }

    /// A matrix has one change, whatever names lead to it.
    fn take(&mut self, name: &str, site: &Site) -> Result<(), IngestError> {
        match self.taken.insert((site.block, site.role), name.to_owned()) {
            Some(other) => Err(PeftError::Twice { name: name.to_owned(), other }.into()),
            None => Ok(()),
        }
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry, IngestError> {
        Ok(self.files.get(name).expect("names come from these files"))
    }

    fn float(&self, name: &str, entry: &TensorEntry) -> Result<Dtype, IngestError> {
        match entry.element {
            ElementType::Stored(dtype @ (Dtype::F32 | Dtype::F16 | Dtype::Bf16)) => Ok(dtype),
            _ => {
                let advice = "; in an adapter F32, F16 and BF16 are";
                Err(IngestError::TensorType { name: name.to_owned(), element: entry.element.to_string(), advice })
            }
        }
    }

    fn matrix(&self, name: &str) -> Result<[u64; 2], IngestError> {
        let entry = self.entry(name)?;
        self.float(name, entry)?;
        match entry.shape.as_slice() {
            [rows, cols] if *rows > 0 && *cols > 0 => Ok([*rows, *cols]),
            other => Err(PeftError::NoMatrix { name: name.to_owned(), actual: other.to_vec() }.into()),
        }
    }

    fn same_shape(&self, name: &str, actual: &[u64], expected: &[u64]) -> Result<(), IngestError> {
        if actual == expected { Ok(()) } else { Err(self.other_shape(name, actual, expected.to_vec())) }
    }

    fn other_shape(&self, name: &str, actual: &[u64], expected: Vec<u64>) -> IngestError {
        let base = self.base.id.to_string();
        PeftError::Shape { name: name.to_owned(), actual: actual.to_vec(), base, expected }.into()
    }

    fn no_module(&self, name: &str, module: &str) -> IngestError {
        PeftError::NoModule { name: name.to_owned(), module: module.to_owned(), base: self.base.id.to_string() }.into()
    }

    /// Whether all elements of these rows are zero, of either sign.
    fn is_zero(&self, name: &str, rows: Rows) -> bool {
        let view = self.files.view(name).expect("its shape and type were checked");
        let (element, row_bytes) = if view.dtype == Dtype::F32 { (4, view.cols * 4) } else { (2, view.cols * 2) };
        let range = match rows {
            Rows::Range { from, to, .. } => from as usize * row_bytes..to as usize * row_bytes,
            Rows::All | Rows::Unpermuted { .. } => 0..view.bytes.len(),
        };
        // Little-endian: the sign is the highest bit of the last byte.
        view.bytes[range].chunks_exact(element).all(|value| value[..element - 1].iter().all(|b| *b == 0) && value[element - 1] & 0x7f == 0)
    }
}

/// Inputs and outputs of the module that the checkpoint has there: all rows of a fused one.
fn inputs_outputs(site: &Site) -> (u64, u64) {
    let RoleShape::Matrix(rows, cols) = site.shape else { unreachable!("adapted roles are matrices of a known shape") };
    match site.piece.rows {
        Rows::Range { of, .. } => (cols, of),
        _ => (cols, rows),
    }
}

/// The shape that the checkpoint has for a tensor of which the base holds a piece of shape `stored`.
fn checkpoint_shape(piece: &Piece, stored: &[u64]) -> Vec<u64> {
    let mut shape = stored.to_vec();
    if let Rows::Range { of, .. } = piece.rows {
        shape[0] = of;
    }
    if piece.transposed {
        shape.reverse();
    }
    shape
}

/// Gemma's norms are `1 + w` in transformers, and llama.cpp's converter has added the 1.
fn is_gguf_norm(architecture: &str, role: &str, block: &Block) -> bool {
    let norm = match &block.params {
        BlockKind::Embed { .. } | BlockKind::Stitch { .. } => return false,
        BlockKind::Attention { norm, .. } | BlockKind::FeedForward { norm, .. } | BlockKind::Head { norm, .. } => norm,
    };
    let stored_whole = matches!(norm, Norm::Rms { weight_offset, .. } if *weight_offset == 0.0);
    architecture.starts_with("gemma") && role.contains("norm.") && stored_whole
}
