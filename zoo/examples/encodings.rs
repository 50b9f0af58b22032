//! What the encodings of stored tensors save, and how fast they are on one core (processor time), beside a copy, zstd, and XOR with zstd (BitX of ZipLLM,
//! arXiv 2505.06252, section 4.2). All tensors of a safetensors file, and of a second file as deltas to the first:
//! `cargo run --release -p ashlar-zoo --example encodings -- base.safetensors [tuned.safetensors]`.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::encoding::{Base, decode, encode, parse};
use safetensors::SafeTensors;

struct Tensor {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    payload: Vec<u8>,
}

fn load(path: &str) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).expect("the file can be read");
    let file = SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    let tensors = file.tensors().into_iter().filter_map(|(name, view)| {
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            _ => return None,
        };
        let (rows, cols) = match view.shape() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            _ => return None,
        };
        Some((name, Tensor { dtype, rows, cols, payload: view.data().to_vec() }))
    });
    tensors.collect()
}

/// Nanoseconds that this thread has computed for: others that want the core do not count.
fn computed_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells a thread's time");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("it begins with nanoseconds")
}

/// Seconds of one run, the mean of `runs`.
fn seconds(runs: u32, mut run: impl FnMut()) -> f64 {
    run();
    let start = computed_ns();
    (0..runs).for_each(|_| run());
    (computed_ns() - start) as f64 / 1e9 / f64::from(runs)
}

fn print(method: &str, kind: &str, raw: usize, encoded: usize, encode_s: f64, decode_s: f64) {
    let saved = 100.0 * (1.0 - encoded as f64 / raw as f64);
    let rate = |seconds: f64| raw as f64 / 1e6 / seconds;
    println!("| {method} | {kind} | {saved:.2} | {:.0} | {:.0} |", rate(encode_s), rate(decode_s));
}

/// Ours, over all tensors; the base's by name.
fn ours(tensors: &BTreeMap<String, Tensor>, bases: Option<&BTreeMap<String, Tensor>>, kind: &str) {
    let (mut raw, mut encoded_bytes, mut encode_s, mut decode_s) = (0, 0, 0.0, 0.0);
    for (name, tensor) in tensors {
        let base = bases.map(|bases| Base { digest: Digest([0; 32]), depth: 0, payload: &bases[name].payload });
        let mut encoded = None;
        encode_s += seconds(1, || encoded = encode(tensor.dtype, tensor.rows, tensor.cols, &tensor.payload, base.as_ref()));
        let mut out = vec![0; tensor.payload.len()];
        raw += out.len();
        let Some(encoded) = encoded else {
            encoded_bytes += out.len();
            decode_s += seconds(5, || out.copy_from_slice(&tensor.payload));
            continue;
        };
        encoded_bytes += encoded.bytes.len();
        decode_s += seconds(5, || {
            let prelude = parse(encoded.encoding as u8, tensor.dtype, tensor.rows, tensor.cols, &encoded.bytes).expect("just encoded");
            let base = prelude.base.and(base.map(|base| base.payload));
            decode(&prelude, &encoded.bytes, base, &mut out).expect("just encoded");
        });
        assert!(out == tensor.payload, "{name}");
    }
    print("ours", kind, raw, encoded_bytes, encode_s, decode_s);
}

/// zstd of all tensors; with bases XOR first, bytes of an element in planes.
fn zstd(tensors: &BTreeMap<String, Tensor>, bases: Option<&BTreeMap<String, Tensor>>, level: i32, kind: &str) {
    let (mut raw, mut encoded_bytes, mut encode_s, mut decode_s) = (0, 0, 0.0, 0.0);
    for (name, tensor) in tensors {
        let width = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
        let (len, count) = (tensor.payload.len(), tensor.payload.len() / width);
        let mut encoded = Vec::new();
        encode_s += seconds(1, || {
            let mut planes = tensor.payload.clone();
            if let Some(bases) = bases {
                let base = &bases[name].payload;
                for plane in 0..width {
                    let bytes = tensor.payload.iter().zip(base).skip(plane).step_by(width);
                    planes[plane * count..].iter_mut().zip(bytes).for_each(|(to, (a, b))| *to = a ^ b);
                }
            }
            encoded = zstd::bulk::compress(&planes, level).expect("memory only");
        });
        let (mut planes, mut out) = (vec![0; len], vec![0; len]);
        decode_s += seconds(3, || {
            zstd::bulk::decompress_to_buffer(&encoded, &mut planes).expect("just compressed");
            match bases {
                None => out.copy_from_slice(&planes),
                Some(bases) if width == 2 => {
                    let (low, high) = planes.split_at(count);
                    let base = bases[name].payload.as_chunks::<2>().0;
                    for (((out, a), b), base) in out.as_chunks_mut::<2>().0.iter_mut().zip(low).zip(high).zip(base) {
                        *out = [a ^ base[0], b ^ base[1]];
                    }
                }
                Some(bases) => {
                    for plane in 0..width {
                        let base = bases[name].payload.iter().skip(plane).step_by(width);
                        let bytes = out.iter_mut().skip(plane).step_by(width);
                        bytes.zip(&planes[plane * count..]).zip(base).for_each(|((to, a), b)| *to = a ^ b);
                    }
                }
            }
        });
        assert!(out == tensor.payload, "{name}");
        raw += len;
        encoded_bytes += encoded.len();
    }
    let method = if bases.is_some() { format!("XOR, planes, zstd -{level}") } else { format!("zstd -{level}") };
    print(&method, kind, raw, encoded_bytes, encode_s, decode_s);
}

fn main() {
    let paths: Vec<String> = std::env::args().skip(1).collect();
    let [base, tuned @ ..] = &paths[..] else { panic!("encodings base.safetensors [tuned.safetensors]") };
    println!("| method | kind | saved % | encode MB/s | decode MB/s |\n| --- | --- | ---: | ---: | ---: |");
    let base = load(base);
    let raw: usize = base.values().map(|tensor| tensor.payload.len()).sum();
    let (copy_s, hash_s) = base.values().fold((0.0, 0.0), |(copy_s, hash_s), tensor| {
        let mut out = vec![0; tensor.payload.len()];
        let copy_s = copy_s + seconds(5, || out.copy_from_slice(&tensor.payload));
        (copy_s, hash_s + seconds(3, || _ = std::hint::black_box(Digest::of(&tensor.payload))))
    });
    print("copy", "-", raw, raw, copy_s, copy_s);
    print("BLAKE3 of the result", "-", raw, raw, hash_s, hash_s);
    ours(&base, None, "solo");
    zstd(&base, None, 3, "solo");
    if let [tuned] = tuned {
        let mut tuned = load(tuned);
        tuned.retain(|name, tensor| base.get(name).is_some_and(|base| base.payload.len() == tensor.payload.len()));
        ours(&tuned, Some(&base), "delta");
        zstd(&tuned, Some(&base), 1, "delta");
        zstd(&tuned, Some(&base), 3, "delta");
    }
}
