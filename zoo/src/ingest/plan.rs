//! Which source tensors make which blocks: every role is matched with a piece of the checkpoint and every shape checked,
//! before a byte is converted.

use std::collections::BTreeSet;
use std::sync::Arc;

use ashlar_kernels::format::Dtype;

use super::IngestError;
use super::checkpoint::Checkpoint;
use super::convert::{Recipe, Use};
use crate::family::Decoder;
use crate::family::names::{Piece, Place, Rows};
use crate::formats::{ElementType, TensorFiles};
use crate::manifest::{Block, BlockKind};
use crate::quantised::{Matrix, Quantised};
use crate::roles::{self, Role, RoleShape};
use crate::tensor_file;

/// A model, planned.
#[derive(Debug)]
pub(super) struct Plan {
    /// embed, (attention, feed_forward) of each layer, head.
    pub(super) blocks: Vec<BlockPlan>,
    /// Distinct tensors to store.
    pub(super) tensors: Vec<TensorPlan>,
    pub(super) vocab: u32,
    pub(super) context_tokens: u32,
}

#[derive(Debug)]
pub(super) struct BlockPlan {
    pub(super) params: BlockKind,
    /// Role and index into the plan's tensors.
    pub(super) tensors: Vec<(&'static str, usize)>,
}

impl BlockPlan {
    /// Index of the tensor of a role.
    pub(super) fn tensor(&self, role: &str) -> usize {
        self.tensors.iter().find(|(name, _)| *name == role).expect("planned for the block's kind").1
    }
}

/// A tensor to store: where it comes from and what it becomes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorPlan {
    pub(super) piece: Piece,
    /// Where several tensors of the source are this one: `source` is what they are read as.
    pub(super) matrix: Option<Arc<Matrix>>,
    pub(super) source: Dtype,
    /// Shape of the source, `[rows, cols]` or `[cols]`.
    pub(super) source_shape: Vec<u64>,
    pub(super) target: Dtype,
    pub(super) shape: Vec<u64>,
}

struct Planner<'a> {
    decoder: &'a Decoder,
    files: &'a TensorFiles,
    quantised: &'a Quantised,
    recipe: Recipe,
    tensors: Vec<TensorPlan>,
    used: BTreeSet<String>,
}

/// Plans a checkpoint.
pub(super) fn plan(checkpoint: &Checkpoint, recipe: Recipe) -> Result<Plan, IngestError> {
    let decoder = &checkpoint.decoder;
    let (files, quantised) = (&*checkpoint.tensors, &checkpoint.quantised);
    let mut planner = Planner { decoder, files, quantised, recipe, tensors: Vec::new(), used: BTreeSet::new() };
    let mut blocks = vec![planner.block(Place::Embed, &BlockKind::Embed { scale: decoder.embed_scale })?];
    for (index, layer) in (0u32..).zip(&decoder.layers) {
        blocks.push(planner.block(Place::Layer(index), &layer.attention)?);
        blocks.push(planner.block(Place::Layer(index), &layer.feed_forward)?);
    }
    blocks.push(planner.block(Place::Head, &decoder.head)?);
    planner.refuse_unused()?;
    let vocab = planner.vocab(&blocks)?;
    let context_tokens = planner.context(&blocks)?;
    Ok(Plan { blocks, tensors: planner.tensors, vocab, context_tokens })
}

impl Planner<'_> {
    fn block(&mut self, place: Place, params: &BlockKind) -> Result<BlockPlan, IngestError> {
        // The hyper-parameters alone; tensors are matched below, with the checkpoint's names in the errors.
        let probe = Block { width: self.decoder.width, params: params.clone(), tensors: Default::default() };
        match probe.check() {
            Ok(()) | Err(roles::ManifestError::Missing(_)) => {}
            Err(source) => return Err(IngestError::Block { block: describe(place, params), source }),
        }
        let mut tensors = Vec::new();
        for role in roles::roles(self.decoder.width, params) {
            if role.required || self.wanted(role.name) {
                tensors.push((role.name, self.tensor(place, params, &role)?));
            }
        }
        Ok(BlockPlan { params: params.clone(), tensors })
    }

    /// Whether an optional role belongs to this family.
    fn wanted(&self, role: &str) -> bool {
        let bias = self.decoder.bias;
        match role {
            "position.weight" => self.decoder.learned_positions,
            "q.bias" | "k.bias" | "v.bias" => bias.qkv,
            "o.bias" => bias.output,
            "gate.bias" | "up.bias" | "down.bias" => bias.feed_forward,
            "norm.bias" => true, // LayerNorm only, and there always.
            _ => false,
        }
    }

    fn tensor(&mut self, place: Place, params: &BlockKind, role: &Role) -> Result<usize, IngestError> {
        let mut piece = self.decoder.names.piece(place, params, role.name);
        let mut used_as = used_as(role);
        if role.name == "output.weight" && self.tied(&piece.name)? {
            self.used.insert(piece.name);
            piece = self.decoder.names.piece(Place::Embed, params, "token.weight");
            used_as = Use::TokenTable;
        }
        let matrix = self.quantised.get(&piece.name).cloned();
        let (element, from_shape) = match (&matrix, self.files.get(&piece.name)) {
            (Some(matrix), _) => {
                // Whatever the tensors were, outputs come first now.
                piece.transposed = false;
                self.used.extend(matrix.parts.iter().cloned());
                (ElementType::Stored(matrix.dtype), matrix.shape.to_vec())
            }
            (None, Some(entry)) => (entry.element.clone(), entry.shape.clone()),
            (None, None) => {
                let block = describe(place, params);
                return Err(IngestError::MissingTensor { name: piece.name, role: role.name.to_owned(), block });
            }
        };
        self.used.insert(piece.name.clone());
        let ElementType::Stored(source) = element else {
            let advice = "; supported are F32, F16, BF16, and in GGUF also Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";
            return Err(IngestError::TensorType { name: piece.name, element: element.to_string(), advice });
        };
        let Some(shape) = target_shape(&piece, &from_shape).filter(|shape| role.shape.fits(shape)) else {
            return Err(IngestError::TensorShape {
                name: piece.name.clone(),
                actual: from_shape,
                expected: source_shape(&piece, role.shape),
            });
        };
        let in_rows = !piece.transposed && (shape.len() == 2 || piece.rows == Rows::All);
        if !in_rows && !matches!(source, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
            let advice = " where the tensor has to be transposed or cut within a row";
            return Err(IngestError::TensorType { name: piece.name, element: source.to_string(), advice });
        }
        let target = self.recipe.target(used_as, source);
        if tensor_file::payload_bytes(target, &shape).is_none() {
            let expected = format!("a shape that {target} can hold");
            return Err(IngestError::TensorShape { name: piece.name.clone(), actual: from_shape, expected });
        }
        let planned = TensorPlan { piece, matrix, source, source_shape: from_shape, target, shape };
        // Tied output and embedding are one tensor; nothing else repeats.
        if let Some(index) = self.tensors.iter().take(2).position(|tensor| *tensor == planned) {
            return Ok(index);
        }
        self.tensors.push(planned);
        Ok(self.tensors.len() - 1)
    }

    /// Whether the output projection is the embedding. A checkpoint that says so and yet holds another one is refused.
    fn tied(&self, output: &str) -> Result<bool, IngestError> {
        let present = self.files.get(output).is_some() || self.quantised.get(output).is_some();
        match self.decoder.tied {
            None => Ok(!present),
            Some(true) if present => {
                if self.quantised.get(output).is_some() {
                    return Err(IngestError::Untied { name: output.to_owned() });
                }
                let embedding = self.decoder.names.piece(Place::Embed, &self.decoder.head, "token.weight").name;
                let same = self.files.get(output).map(|entry| (&entry.element, &entry.shape))
                    == self.files.get(&embedding).map(|entry| (&entry.element, &entry.shape))
                    && self.files.bytes(output).as_ref().map(AsRef::as_ref)
                        == self.files.bytes(&embedding).as_ref().map(AsRef::<[u8]>::as_ref);
                if same { Ok(true) } else { Err(IngestError::Untied { name: output.to_owned() }) }
            }
            Some(tied) => Ok(tied),
        }
    }

    fn refuse_unused(&self) -> Result<(), IngestError> {
        let names = &self.decoder.names;
        let mut unused =
            self.files.names().filter(|name| !self.used.contains(*name) && !names.ignores(name) && !self.quantised.ignores(name));
        let Some(name) = unused.next() else { return Ok(()) };
        let more = match unused.count() {
            0 => String::new(),
            count => format!(" (and {count} more)"),
        };
        Err(IngestError::UnexpectedTensor { name: name.to_owned(), architecture: self.decoder.architecture, more })
    }

    /// Rows of embedding and output agree with each other and with the configuration.
    fn vocab(&self, blocks: &[BlockPlan]) -> Result<u32, IngestError> {
        let embedding = &self.tensors[tensor_of(blocks, 0, "token.weight")];
        let output = &self.tensors[tensor_of(blocks, blocks.len() - 1, "output.weight")];
        let rows = embedding.shape[0];
        let stated = self.decoder.vocab.map_or(rows, u64::from);
        for tensor in [embedding, output] {
            if tensor.shape[0] != stated {
                let expected = format!("[{stated}, {}]", self.decoder.width);
                return Err(IngestError::TensorShape { name: tensor.piece.name.clone(), actual: tensor.source_shape.clone(), expected });
            }
        }
        u32::try_from(rows).map_err(|_| IngestError::TensorShape {
            name: embedding.piece.name.clone(),
            actual: embedding.source_shape.clone(),
            expected: "at most 2^32 rows".to_owned(),
        })
    }

    /// Learned positions must be there for the whole context.
    fn context(&self, blocks: &[BlockPlan]) -> Result<u32, IngestError> {
        let context = self.decoder.context_tokens;
        if self.decoder.learned_positions {
            let positions = &self.tensors[tensor_of(blocks, 0, "position.weight")];
            if positions.shape[0] < u64::from(context) {
                let expected = format!("[{context}, {}]", self.decoder.width);
                return Err(IngestError::TensorShape {
                    name: positions.piece.name.clone(),
                    actual: positions.source_shape.clone(),
                    expected,
                });
            }
        }
        Ok(context)
    }
}

fn tensor_of(blocks: &[BlockPlan], block: usize, role: &str) -> usize {
    blocks[block].tensor(role)
}

fn used_as(role: &Role) -> Use {
    match role.name {
        "token.weight" => Use::TokenTable,
        "position.weight" => Use::PositionTable,
        _ if matches!(role.shape, RoleShape::Vector(_)) => Use::Vector,
        _ => Use::Linear,
    }
}

/// Shape of what `piece` takes out of a source of this shape; `None` when it does not fit.
pub(super) fn target_shape(piece: &Piece, source: &[u64]) -> Option<Vec<u64>> {
    tensor_file::rows_cols(source)?;
    let mut shape = source.to_vec();
    if piece.transposed {
        let [inputs, outputs] = *source else { return None };
        shape = vec![outputs, inputs];
    }
    match piece.rows {
        Rows::All => {}
        Rows::Range { from, to, of } => {
            if shape[0] != of {
                return None;
            }
            shape[0] = to - from;
        }
        Rows::Unpermuted { head_dim } => {
            if head_dim == 0 || !head_dim.is_multiple_of(2) || !shape[0].is_multiple_of(head_dim) {
                return None;
            }
        }
    }
    Some(shape)
}

/// The shape that the source should have had, for messages.
fn source_shape(piece: &Piece, shape: RoleShape) -> String {
    let rows = |rows: u64| match piece.rows {
        Rows::Range { of, .. } => of,
        _ => rows,
    };
    match shape {
        RoleShape::Vector(k) => format!("[{}]", rows(k)),
        RoleShape::Matrix(n, k) if piece.transposed => format!("[{k}, {}]", rows(n)),
        RoleShape::Matrix(n, k) => format!("[{}, {k}]", rows(n)),
        RoleShape::Rows(k) => format!("[rows, {k}]"),
    }
}

fn describe(place: Place, params: &BlockKind) -> String {
    match (place, params) {
        (Place::Embed, _) => "the embed block".to_owned(),
        (Place::Head, _) => "the head block".to_owned(),
        (Place::Layer(layer), BlockKind::Attention { .. }) => format!("the attention block of layer {layer}"),
        (Place::Layer(layer), _) => format!("the feed_forward block of layer {layer}"),
    }
}
