//! The tensors of a checkpoint out of those of blocks: what ingest has split and transposed is put together and turned back, and the rest is
//! written straight out of the zoo's maps.

use std::collections::BTreeMap;
use std::io::Write;

use ashlar_kernels::format::Dtype;
use serde_json::{Map, Value, json};

use super::{ExportError, is_tied};
use crate::family::names::{Names, Piece, Place, Rows};
use crate::ingest::gather::{self, element_bytes};
use crate::inspect::Resolved;
use crate::manifest::TensorRef;
use crate::store::Zoo;
use crate::tensor::MappedTensor;

/// A tensor of the checkpoint.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    payload: Payload,
}

#[derive(Debug)]
enum Payload {
    /// As the zoo has it, one after another.
    Stored(Vec<MappedTensor>),
    /// Turned back.
    Made(Vec<u8>),
}

/// A part of a tensor: where it begins in it, and what it is.
type Part = (Piece, TensorRef);

/// All tensors, those with wide elements first, so that each begins at a multiple of its elements' size.
pub(super) async fn of_model(zoo: &Zoo, model: &Resolved, names: &Names) -> Result<Vec<Tensor>, ExportError> {
    let tied = is_tied(model);
    let mut parts: BTreeMap<String, Vec<Part>> = BTreeMap::new();
    for (index, block) in model.blocks.iter().enumerate() {
        let place = place(index, model.blocks.len());
        for (role, tensor) in &block.tensors {
            if tied && place == Place::Head && role == "output.weight" {
                continue;
            }
            let piece = names.piece(place, &block.params, role);
            parts.entry(piece.name.clone()).or_default().push((piece, tensor.clone()));
        }
    }
    let mut tensors = Vec::with_capacity(parts.len());
    for (name, parts) in parts {
        tensors.push(tensor(zoo, name, parts).await?);
    }
    tensors.sort_by(|one, other| (element_bytes(other.dtype), &one.name).cmp(&(element_bytes(one.dtype), &other.name)));
    Ok(tensors)
}

/// Where a block of a chain is.
pub(super) fn place(index: usize, count: usize) -> Place {
    match index {
        0 => Place::Embed,
        _ if index + 1 == count => Place::Head,
        _ => Place::Layer(u32::try_from((index - 1) / 2).expect("chains have at most 4096 blocks")),
    }
}

/// A tensor that is what the zoo has, one after another.
pub(super) fn stored(name: String, dtype: Dtype, shape: Vec<u64>, parts: Vec<MappedTensor>) -> Tensor {
    Tensor { name, dtype, shape, payload: Payload::Stored(parts) }
}

/// A tensor that was put together.
pub(super) fn made(name: String, dtype: Dtype, shape: Vec<u64>, bytes: Vec<u8>) -> Tensor {
    Tensor { name, dtype, shape, payload: Payload::Made(bytes) }
}

async fn tensor(zoo: &Zoo, name: String, mut parts: Vec<Part>) -> Result<Tensor, ExportError> {
    parts.sort_by_key(|(piece, _)| match piece.rows {
        Rows::Range { from, .. } => from,
        Rows::All | Rows::Unpermuted { .. } => 0,
    });
    let (first, whole) = parts.first().expect("a name has a part");
    let (transposed, dtype, dimensions) = (first.transposed, whole.dtype, whole.shape.len());
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
        return Err(ExportError::Quantised { name, dtype: dtype.to_string() });
    }
    // Parts follow each other, are all there, and of one kind.
    let mut rows = 0;
    for (piece, tensor) in &parts {
        let (begins, follows) = match piece.rows {
            Rows::Range { from, .. } => (from == rows, tensor.shape[1..] == whole.shape[1..]),
            Rows::All | Rows::Unpermuted { .. } => (true, parts.len() == 1),
        };
        if !begins || !follows || tensor.dtype != dtype || piece.transposed != transposed || tensor.shape.len() != dimensions {
            return Err(ExportError::Parts(name));
        }
        rows += tensor.shape[0];
    }
    if matches!(parts.last(), Some((Piece { rows: Rows::Range { of, .. }, .. }, _)) if *of != rows) {
        return Err(ExportError::Parts(name));
    }
    let mut shape: Vec<u64> = std::iter::once(rows).chain(whole.shape[1..].iter().copied()).collect();
    let mut stored = Vec::with_capacity(parts.len());
    for (_, tensor) in &parts {
        stored.push(zoo.map_tensor(tensor).await?);
    }
    let payload = if transposed && dimensions == 2 {
        let all: Vec<u8> = stored.iter().flat_map(|part| part.as_ref().iter().copied()).collect();
        let size = |value: u64| usize::try_from(value).expect("it is in memory");
        let turned = gather::transposed(&all, size(shape[0]), size(shape[1]), element_bytes(dtype));
        shape.swap(0, 1);
        Payload::Made(turned)
    } else {
        Payload::Stored(stored)
    };
    Ok(Tensor { name, dtype, shape, payload })
}

/// Writes a safetensors file: the length of the header, the header, the tensors without holes.
pub(super) fn write(tensors: &[Tensor], file: &mut impl Write) -> std::io::Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.payload.len() as u64;
        let dtype = match tensor.dtype {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            _ => "BF16",
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&Value::Object(header)).expect("text keys and plain values");
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in tensors {
        match &tensor.payload {
            Payload::Made(bytes) => file.write_all(bytes)?,
            Payload::Stored(parts) => {
                for part in parts {
                    file.write_all(part.as_ref())?;
                    part.release_pages();
                }
            }
        }
    }
    Ok(())
}

impl Payload {
    fn len(&self) -> usize {
        match self {
            Self::Made(bytes) => bytes.len(),
            Self::Stored(parts) => parts.iter().map(|part| part.as_ref().len()).sum(),
        }
    }
}
