//! The GGUF parser, and what reads its metadata.

use ashlar_zoo::family;
use ashlar_zoo::formats::TensorEntry;

struct Entries(Vec<(String, TensorEntry)>);

impl family::gguf::Tensors for Entries {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(other, _)| other == name)
    }

    fn vector(&self, _: &str) -> Option<Vec<f64>> {
        None
    }
}

/// Whatever is accepted lies within the file; decoder and tokenizer come or are refused.
pub fn gguf(data: &[u8]) {
    let Ok(parsed) = ashlar_zoo::formats::gguf::parse(data) else { return };
    for (name, entry) in &parsed.tensors {
        assert!(entry.start + entry.len <= data.len(), "{name}");
    }
    let _ = family::gguf::decoder(&parsed.metadata, &Entries(parsed.tensors));
    if let Ok(json) = ashlar_zoo::tokenizer::from_gguf(&parsed.metadata) {
        let _ = ashlar_zoo::tokenizer::fit(json, 300);
    }
}
