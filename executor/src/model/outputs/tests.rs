//! A tied table is read out of its head: same tokens, one copy, and bytes that are counted as long as somebody holds them.

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_kernels::reference::Reference;
use ashlar_zoo::manifest::{Block, BlockKind};

use super::*;
use crate::model::alone::{Alone, AloneLimits};
use crate::model::block::LoadedBlock;
use crate::model::testing::{Memory, RMS, VOCAB, WIDTH};

const LIMITS: AloneLimits = AloneLimits { chunk_tokens_max: 32, tokens_max: 48, page_tokens: 16, kv_format: KvFormat::F32 };

fn cpu(bf16_compute: Bf16Compute) -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute }))
}

fn load<B: Ops>(ops: &B, block: &Block, memory: &Memory, outputs: &Outputs<B>) -> LoadedBlock<B> {
    LoadedBlock::load(ops, block, memory, outputs).unwrap()
}

/// Bytes of learned positions, which stay mapped.
const POSITION_BYTES: u64 = 4 * VOCAB * WIDTH as u64;

#[test]
fn a_tied_table_is_read_out_of_its_head_with_the_same_logits() {
    let dtypes = [None, Some(Dtype::F16), Some(Dtype::Bf16), Some(Dtype::Int8 { group: 32 }), Some(Dtype::Int4Minimum { group: 32 })];
    for dtype in dtypes {
        let ops = cpu(Bf16Compute::F32);
        let mut memory = Memory::default();
        let blocks = memory.tied_blocks(dtype);
        let digest = blocks[0].tensors["token.weight"].digest;
        // Each alone: the table stays where it is stored.
        let mapped: Vec<LoadedBlock<Cpu>> = blocks.iter().map(|block| load(&*ops, block, &memory, &Outputs::default())).collect();
        let outputs = Outputs::default();
        let mut packed: Vec<LoadedBlock<Cpu>> = blocks.iter().rev().map(|block| load(&*ops, block, &memory, &outputs)).collect();
        packed.reverse();

        let head = packed[5].weights();
        assert_eq!(mapped[5].weights(), head);
        let (_, output_bytes) = head.output.unwrap();
        assert!(output_bytes >= memory.0[&digest].view().bytes.len() as u64);
        assert_eq!(packed[0].weights().output, Some((digest, output_bytes)));
        assert_eq!(mapped[0].weights().output, None);
        let token_bytes = memory.0[&digest].view().bytes.len() as u64;
        assert_eq!(mapped[0].weights().own, packed[0].weights().own + token_bytes, "only the tokens' table is gone");

        let mut mapped = Alone::new(Arc::clone(&ops), mapped, LIMITS).unwrap();
        let mut packed = Alone::new(ops, packed, LIMITS).unwrap();
        assert_eq!(mapped.weight_bytes() - packed.weight_bytes(), token_bytes as usize);
        let prompt: Vec<u32> = (0..20).map(|i| i * 7 % VOCAB as u32).collect();
        assert_eq!(mapped.greedy(&prompt, 12, 7), packed.greedy(&prompt, 12, 7), "{dtype:?}");
    }
}

#[test]
fn an_output_projection_counts_until_its_last_holder_is_gone() {
    let ops = cpu(Bf16Compute::F32);
    let mut memory = Memory::default();
    let blocks = memory.tied_blocks(None);
    let digest = blocks[0].tensors["token.weight"].digest;
    let mut other = memory.block(BlockKind::Head { norm: RMS, softcap: None, scale: 1.0 });
    let untied = other.clone();
    other.tensors.insert("output.weight".to_owned(), blocks[0].tensors["token.weight"].clone());

    let outputs = Outputs::default();
    let head = load(&*ops, &blocks[5], &memory, &outputs);
    let embed = load(&*ops, &blocks[0], &memory, &outputs);
    // The norm of the head, and the positions of the embedding; 50 outputs are four panels of 16.
    let (norm_bytes, output_bytes) = (4 * u64::from(WIDTH), 4 * 64 * u64::from(WIDTH));
    assert_eq!(head.weights(), WeightBytes { own: norm_bytes, output: Some((digest, output_bytes)) });
    assert_eq!(embed.weights(), WeightBytes { own: POSITION_BYTES, output: Some((digest, output_bytes)) });
    assert_eq!(embed.bytes() as u64, POSITION_BYTES + output_bytes);
    let both = norm_bytes + POSITION_BYTES + output_bytes;
    assert_eq!(total_bytes([head.weights(), embed.weights()]), both);
    // A head with another norm shares the projection; one of another tensor does not.
    let second = load(&*ops, &other, &memory, &outputs);
    let third = load(&*ops, &untied, &memory, &outputs);
    assert_eq!(total_bytes([head.weights(), embed.weights(), second.weights()]), both + norm_bytes);
    assert_eq!(total_bytes([head.weights(), embed.weights(), third.weights()]), both + norm_bytes + output_bytes);

    drop((head, second));
    assert!(outputs.find(digest).is_some(), "the embedding reads it");
    assert_eq!(total_bytes([embed.weights()]), POSITION_BYTES + output_bytes);
    // A head that comes back finds it.
    let again = load(&*ops, &blocks[5], &memory, &outputs);
    assert_eq!(total_bytes([again.weights(), embed.weights()]), both);
    drop((again, embed));
    assert!(outputs.find(digest).is_none());
    // And an embedding without a head is mapped.
    let embed = load(&*ops, &blocks[0], &memory, &outputs);
    assert_eq!(embed.weights(), WeightBytes { own: 2 * POSITION_BYTES, output: None });
}

#[test]
fn a_table_stays_mapped_where_the_device_cannot_read_rows() {
    let mut memory = Memory::default();
    let blocks = memory.tied_blocks(Some(Dtype::Bf16));
    let outputs = Outputs::default();
    let reference = Reference::default();
    let (_head, embed) = (load(&reference, &blocks[5], &memory, &outputs), load(&reference, &blocks[0], &memory, &outputs));
    assert_eq!(embed.weights().output, None);
    // Packed for bf16 activations, subnormal weights are gone.
    let (ops, outputs) = (cpu(Bf16Compute::Bf16), Outputs::default());
    let (_head, embed) = (load(&*ops, &blocks[5], &memory, &outputs), load(&*ops, &blocks[0], &memory, &outputs));
    assert_eq!(embed.weights().output, None);
}
