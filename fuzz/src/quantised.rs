//! Ready-quantised checkpoints: `quantization_config` and the tensors that it speaks of.

use ashlar_kernels::format::TensorView;
use ashlar_zoo::family::Config;
use ashlar_zoo::formats::shards;
use ashlar_zoo::quantised::{Quantised, Scheme};

/// What is accepted reads as whole matrices of the dtype that was chosen. Three pieces with a newline after each of the first two:
/// config.json, a safetensors header without its length (which a mutation would seldom leave true), and data.
pub fn quantised(data: &[u8]) {
    let mut pieces = data.splitn(3, |byte| *byte == b'\n');
    let [Some(config), Some(header), Some(data)] = [pieces.next(), pieces.next(), pieces.next()] else { return };
    let Ok(config) = Config::parse(config, "config.json") else { return };
    let Ok(Some(scheme)) = Scheme::read(&config) else { return };
    let dir = tempfile::tempdir().expect("a directory for one file");
    let file = [&(header.len() as u64).to_le_bytes()[..], header, data].concat();
    std::fs::write(dir.path().join("model.safetensors"), file).expect("a small file");
    let Ok(files) = shards::open(dir.path()) else { return };
    let Ok(found) = Quantised::find(&files, &scheme) else { return };
    for (name, matrix) in found.iter() {
        let [rows, cols] = matrix.shape().map(|dim| usize::try_from(dim).expect("within a small file"));
        let bytes = matrix.rows(&files, 0..rows);
        let view = TensorView { dtype: matrix.dtype(), rows, cols, bytes: &bytes };
        view.check().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
