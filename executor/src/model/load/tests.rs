//! What does not fit is refused with the role and the shapes.

use ashlar_kernels::ops::{KvFormat, PageLayout};
use ashlar_kernels::reference::Reference;
use ashlar_zoo::manifest::BlockKind;

use super::*;
use crate::model::testing::{Memory, RMS, VOCAB, WIDTH, attention};

const PAGES: PageLayout = PageLayout { tokens: 32, format: KvFormat::Bf16 };

fn load(block: &Block, memory: &Memory) -> Result<LoadedBlock<Reference>, LoadError> {
    LoadedBlock::load(&Reference::default(), block, memory, &Outputs::default())
}

#[test]
fn loaded_blocks_tell_what_they_are() {
    let mut memory = Memory::default();
    let embed = load(&memory.block(BlockKind::Embed { scale: 1.0 }), &memory).unwrap();
    assert!(embed.is_embed() && !embed.is_head() && embed.kv_shape(PAGES).is_none());
    assert_eq!((embed.vocab(), embed.position_count()), (Some(VOCAB as usize), Some(VOCAB as usize)));
    assert_eq!(embed.bytes(), 2 * 4 * (VOCAB * u64::from(WIDTH)) as usize);

    let attention = load(&memory.block(attention()), &memory).unwrap();
    let shape = attention.kv_shape(PAGES).unwrap();
    assert_eq!((shape.kv_heads, shape.head_dim, shape.page_tokens, shape.format), (2, 8, 32, KvFormat::Bf16));
    assert_eq!((attention.width(), attention.window(), attention.vocab()), (WIDTH as usize, Some(9), None));

    let head = load(&memory.block(BlockKind::Head { norm: RMS, softcap: None, scale: 1.0 }), &memory).unwrap();
    assert!(head.is_head());
    assert_eq!(head.vocab(), Some(VOCAB as usize));
}

#[test]
fn descriptor_that_contradicts_itself_is_refused() {
    let mut memory = Memory::default();
    let mut block = memory.block(attention());
    block.tensors.get_mut("k.weight").unwrap().shape = vec![15, 32];
    assert!(matches!(load(&block, &memory), Err(LoadError::Manifest(ManifestError::Shape { role, .. })) if role == "k.weight"));
    block.tensors.remove("k.weight");
    assert!(matches!(load(&block, &memory), Err(LoadError::Manifest(ManifestError::Missing("k.weight")))));
}

#[test]
fn tensor_of_another_shape_is_refused_by_role() {
    let mut memory = Memory::default();
    let block = memory.block(attention());
    let digest = block.tensors["o.weight"].digest;
    memory.0.get_mut(&digest).unwrap().rows = 31;
    let error = load(&block, &memory).unwrap_err();
    assert_eq!(error.to_string(), "tensor `o.weight` is f32 [31, 32], expected f32 [32, 32]");
    memory.0.remove(&digest);
    assert!(matches!(load(&block, &memory), Err(LoadError::Source { role, source: SourceError::Missing(_) }) if role == "o.weight"));
}

#[test]
fn bytes_of_the_wrong_length_are_refused_by_role() {
    let mut memory = Memory::default();
    let block = memory.block(attention());
    let digest = block.tensors["k.weight"].digest;
    memory.0.get_mut(&digest).unwrap().keep = Arc::new(vec![0u8; 12]);
    assert!(matches!(load(&block, &memory), Err(LoadError::Pack { role: "q.weight", source: PackError::Length { .. } })));
}

#[test]
fn what_no_op_computes_is_refused() {
    let mut memory = Memory::default();
    let head = memory.block(BlockKind::Head { norm: RMS, softcap: None, scale: 0.5 });
    assert!(matches!(load(&head, &memory), Err(LoadError::Unsupported(_))));
    let BlockKind::Attention { heads, kv_heads, head_dim, scale, norm, .. } = attention() else { unreachable!() };
    let qk_norm = Some(Norm::Layer { eps: 1e-5 });
    let odd =
        BlockKind::Attention { norm, heads, kv_heads, head_dim, scale, rope: None, window: None, softcap: None, qk_norm, post_norm: None };
    let odd = memory.block(odd);
    assert!(matches!(load(&odd, &memory), Err(LoadError::Unsupported(_))));
}

#[test]
fn missing_biases_among_fused_parts_are_zeros() {
    let mut memory = Memory::default();
    let mut block = memory.block(attention());
    block.tensors.remove("k.bias");
    assert!(load(&block, &memory).is_ok());
    for role in ["q.bias", "v.bias"] {
        block.tensors.remove(role);
    }
    assert!(load(&block, &memory).is_ok());
}
