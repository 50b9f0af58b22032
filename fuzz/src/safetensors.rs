//! The safetensors header parser.

/// Whatever is accepted lies within the file and does not overlap.
pub fn safetensors(data: &[u8]) {
    let Ok(entries) = ashlar_zoo::formats::safetensors::parse(data) else { return };
    let mut end = 0;
    for (name, entry) in entries {
        assert!(entry.start >= end && entry.start + entry.len <= data.len(), "{name}");
        end = entry.start + entry.len;
    }
}
