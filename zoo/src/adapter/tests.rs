//! Adapters that must be refused, alone, over a block, in a chain and in a store; and one that comes back as it went in.

use std::sync::Arc;

use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use super::*;
use crate::digest::Digest;
use crate::manifest::{AdapterRef, Assets, BlockKind, Chain, Defaults, Norm, Tokens};
use crate::roles::ManifestError;
use crate::store::{Compression, MappedChange, Put, StoreError, Zoo};
use crate::{canonical, tensor_file};
use ashlar_kernels::ops::Activation;

fn tensor(shape: &[u64], seed: u8) -> (TensorRef, Vec<u8>) {
    let bytes = tensor_file::payload_bytes(Dtype::F32, shape).expect("a shape that can be stored");
    let payload: Vec<u8> = (0..bytes).map(|i| if i % 4 == 3 { 0x3e } else { (i as u8).wrapping_mul(31).wrapping_add(seed) }).collect();
    (TensorRef { digest: tensor_file::digest(Dtype::F32, shape, &payload), dtype: Dtype::F32, shape: shape.to_vec() }, payload)
}

fn change(rank: u64, rows: u64, cols: u64) -> Change {
    Change::LowRank { scale: 2.0, a: tensor(&[rank, cols], 1).0, b: tensor(&[rows, rank], 2).0 }
}

fn adapter(changes: &[(&str, Change)]) -> Adapter {
    Adapter { changes: changes.iter().map(|(role, change)| ((*role).to_owned(), change.clone())).collect() }
}

fn feed_forward() -> Block {
    let params = BlockKind::FeedForward {
        norm: Norm::Rms { eps: 1e-5, weight_offset: 0.0 },
        activation: Activation::Silu,
        inner: 12,
        gated: false,
        post_norm: None,
    };
    let shapes: [(&str, &[u64]); 3] = [("norm.weight", &[8]), ("up.weight", &[12, 8]), ("down.weight", &[8, 12])];
    Block { width: 8, params, tensors: shapes.iter().map(|(role, shape)| ((*role).to_owned(), tensor(shape, 3).0)).collect() }
}

#[test]
fn what_no_block_could_take_is_refused() {
    assert_eq!(adapter(&[]).check(), Err(AdapterError::Empty));
    assert_eq!(adapter(&[("norm.weight", change(2, 8, 8))]).check(), Err(AdapterError::Role("norm.weight".to_owned())));
    assert_eq!(adapter(&[("q.weight", change(1024, 8, 8))]).check(), Ok(()));
    assert_eq!(adapter(&[("q.weight", change(1025, 8, 8))]).check(), Err(AdapterError::Rank { role: "q.weight".to_owned(), rank: 1025 }));
    for scale in [f32::NAN, f32::INFINITY, -65_537.0] {
        let Change::LowRank { a, b, .. } = change(2, 8, 8) else { unreachable!() };
        let error = adapter(&[("q.weight", Change::LowRank { scale, a, b })]).check().unwrap_err();
        assert_eq!(error.to_string(), format!("`q.weight` has the scale {scale:e}, which is not within 65536"));
    }
    let shapes: [[&[u64]; 2]; 5] = [[&[2, 8], &[8, 3]], [&[2, 8], &[8]], [&[0, 8], &[8, 0]], [&[2, 0], &[8, 2]], [&[], &[8, 2]]];
    for [a, b] in shapes {
        let reference = |shape: &[u64]| TensorRef { digest: Digest([0; 32]), dtype: Dtype::F32, shape: shape.to_vec() };
        let change = Change::LowRank { scale: 1.0, a: reference(a), b: reference(b) };
        assert!(matches!(adapter(&[("q.weight", change)]).check(), Err(AdapterError::Factors { .. })), "{a:?} {b:?}");
    }
    let Change::LowRank { scale, a, mut b } = change(2, 8, 8) else { unreachable!() };
    b.dtype = Dtype::Q8_0;
    let error = adapter(&[("q.weight", Change::LowRank { scale, a, b })]).check().unwrap_err();
    assert_eq!(error.to_string(), "`q.weight` has a factor of type q8_0, not f32, f16 or bf16");
}

#[test]
fn one_bit_deltas_are_matrices_of_signs() {
    let signs = |dtype, shape: &[u64]| Change::OneBit { signs: TensorRef { digest: Digest([0; 32]), dtype, shape: shape.to_vec() } };
    let int1 = Dtype::Int1 { group: 512 };
    let delta = adapter(&[("up.weight", signs(int1, &[12, 8]))]);
    assert_eq!((delta.check(), delta.check_against(&feed_forward())), (Ok(()), Ok(())));
    let places: Vec<_> = delta.tensors().map(|(place, _)| place).collect();
    assert_eq!(places, ["up.weight.signs"]);
    // A group that the numeric contract does not allow, a vector, nothing, another format.
    let refused: [(Dtype, &[u64]); 4] =
        [(Dtype::Int1 { group: 3 }, &[12, 8]), (int1, &[8]), (int1, &[0, 8]), (Dtype::Int8 { group: 32 }, &[12, 8])];
    for (dtype, shape) in refused {
        let error = adapter(&[("up.weight", signs(dtype, shape))]).check().unwrap_err();
        assert_eq!(error.to_string(), format!("`up.weight` has signs of type {dtype} and shape {shape:?}, not int1 and [N, K]"));
    }
    let other = adapter(&[("up.weight", signs(int1, &[8, 12]))]).check_against(&feed_forward()).unwrap_err();
    assert!(matches!(other, AdapterError::Shape { actual: [8, 12], .. }), "{other}");
    let text = canonical::to_bytes(&delta);
    let zeros = "0".repeat(64);
    let expected =
        format!(r#"{{"changes":{{"up.weight":{{"kind":"one_bit","signs":{{"digest":"{zeros}","dtype":"int1g512","shape":[12,8]}}}}}}}}"#);
    assert_eq!(String::from_utf8(text).unwrap(), expected);
}

#[test]
fn an_adapter_of_another_block_is_refused() {
    let block = feed_forward();
    assert_eq!(block.check(), Ok(()));
    assert_eq!(adapter(&[("up.weight", change(2, 12, 8)), ("down.weight", change(3, 8, 12))]).check_against(&block), Ok(()));
    for absent in ["q.weight", "gate.weight"] {
        let error = adapter(&[(absent, change(2, 12, 8))]).check_against(&block);
        assert_eq!(error, Err(AdapterError::Absent(absent.to_owned())));
    }
    let error = adapter(&[("up.weight", change(2, 8, 12))]).check_against(&block).unwrap_err();
    assert_eq!(error.to_string(), "`up.weight` changes a matrix of shape [8, 12], the block's is Matrix(12, 8)");
}

#[test]
fn a_chain_lists_its_adapters_ascending_one_for_each_block() {
    let refs = |indices: &[u32]| indices.iter().map(|at| AdapterRef { block_index: *at, digest: Digest([7; 32]) }).collect::<Vec<_>>();
    let check = |indices: &[u32]| {
        let chain = Chain {
            format: 1,
            architecture: "llama".to_owned(),
            width: 8,
            vocab: 10,
            context_tokens: 16,
            blocks: vec![Digest([1; 32]); 6],
            adapters: refs(indices),
            assets: Assets::default(),
            tokens: Tokens::default(),
            defaults: Defaults::default(),
            licence: None,
            source: "test".to_owned(),
        };
        chain.check()
    };
    assert_eq!(check(&[1, 2, 4]), Ok(()));
    assert_eq!(check(&[2, 1]), Err(ManifestError::AdapterOrder(1)));
    assert_eq!(check(&[1, 1]), Err(ManifestError::AdapterOrder(1)));
    assert_eq!(check(&[6]), Err(ManifestError::Range("adapters.block_index")));
}

#[tokio::test]
async fn an_adapter_comes_back_as_it_went_in_and_damage_names_adapter_and_role() {
    let store = Arc::new(InMemory::new());
    let zoo = Zoo::create(store.clone(), "memory").await.unwrap();
    let ((a, a_bytes), (b, b_bytes)) = (tensor(&[2, 8], 1), tensor(&[12, 2], 2));
    let first = adapter(&[("up.weight", Change::LowRank { scale: 0.1, a: a.clone(), b: b.clone() })]);
    zoo.put_tensor(&a, a_bytes.clone().into(), Compression::Off).await.unwrap();
    let (digest, put) = zoo.put_adapter(&first).await.unwrap();
    assert_eq!(put, Put::New);
    assert_eq!(zoo.put_adapter(&first).await.unwrap(), (digest, Put::Present));
    assert_eq!(zoo.read_adapter(digest).await.unwrap(), first);
    let error = zoo.map_adapter(digest).await.unwrap_err();
    assert_eq!(error.to_string(), format!("tensor {} (`up.weight.b` of adapter {digest}) is not in the zoo", b.digest));

    zoo.put_tensor(&b, b_bytes.clone().into(), Compression::Off).await.unwrap();
    let mapped = zoo.map_adapter(digest).await.unwrap();
    let MappedChange::LowRank { scale, a, b } = &mapped.changes["up.weight"] else { panic!("another change") };
    assert_eq!((*scale, a.as_ref(), b.as_ref()), (0.1, a_bytes.as_slice(), b_bytes.as_slice()));
    assert_eq!((a.rows(), a.cols(), b.rows(), b.cols()), (2, 8, 12, 2));

    // Well-formed JSON of its own digest, but not an adapter that can be.
    let bytes = canonical::to_bytes(&adapter(&[("up.weight", change(2000, 12, 8))]));
    let digest = Digest::of(&bytes);
    store.put(&format!("adapters/{digest}.json").into(), bytes.into()).await.unwrap();
    let error = zoo.read_adapter(digest).await.unwrap_err();
    assert_eq!(error.to_string(), format!("adapter {digest} is damaged: `up.weight` has rank 2000, more than 1024"));
    assert!(matches!(zoo.read_adapter(Digest([9; 32])).await, Err(StoreError::Missing { .. })));
}
