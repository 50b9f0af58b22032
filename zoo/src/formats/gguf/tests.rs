use proptest::prelude::*;

use super::*;

/// Builds files for tests, honest or not.
#[derive(Default)]
pub(crate) struct Writer {
    metadata: Vec<u8>,
    metadata_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
}

impl Writer {
    fn text(out: &mut Vec<u8>, text: &[u8]) {
        out.extend_from_slice(&(text.len() as u64).to_le_bytes());
        out.extend_from_slice(text);
    }

    fn meta(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        Self::text(&mut self.metadata, key.as_bytes());
        self.metadata.extend_from_slice(&kind.to_le_bytes());
        self.metadata.extend_from_slice(bytes);
        self.metadata_count += 1;
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        Self::text(&mut self.infos, name.as_bytes());
        self.infos.extend_from_slice(&(dims.len() as u32).to_le_bytes());
        for dim in dims {
            self.infos.extend_from_slice(&dim.to_le_bytes());
        }
        self.infos.extend_from_slice(&kind.to_le_bytes());
        self.infos.extend_from_slice(&offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    fn file(self, data_len: usize) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend_from_slice(&3u32.to_le_bytes());
        file.extend_from_slice(&self.tensor_count.to_le_bytes());
        file.extend_from_slice(&self.metadata_count.to_le_bytes());
        file.extend_from_slice(&self.metadata);
        file.extend_from_slice(&self.infos);
        file.resize(file.len().next_multiple_of(32) + data_len, 0);
        file
    }
}

#[test]
fn metadata_and_tensors_are_read() {
    let mut array = 4u32.to_le_bytes().to_vec();
    array.extend_from_slice(&2u64.to_le_bytes());
    array.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
    let file = Writer::default()
        .meta("n", 4, &7u32.to_le_bytes())
        .meta("list", 9, &array)
        .tensor("a", &[32, 3], 8, 128)
        .tensor("b", &[4], 0, 0)
        .file(256);
    let gguf = parse(&file).unwrap();
    assert_eq!(gguf.metadata["n"].as_u64(), Some(7));
    assert_eq!(gguf.metadata["list"].as_array().unwrap().len(), 2);
    let names: Vec<&str> = gguf.tensors.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["b", "a"]);
    assert_eq!(gguf.tensors[1].1.shape, [3, 32]);
    assert_eq!(gguf.tensors[1].1.len, 3 * 34);
}

#[test]
fn each_lie_is_refused_by_name() {
    let new = Writer::default;
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = new().tensor("a", &[4], 0, 0).file(32);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let mut huge_array = 8u32.to_le_bytes().to_vec();
    huge_array.extend_from_slice(&(16u64 << 20).to_le_bytes());
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "does not begin with GGUF"),
        ("other magic", b"GGML0000".to_vec(), "does not begin with GGUF"),
        ("version 1", patched(4, &1u32.to_le_bytes()), "version 1"),
        ("big-endian", patched(4, &3u32.to_be_bytes()), "big-endian"),
        ("many tensors", patched(8, &u64::MAX.to_le_bytes()), "number of tensors"),
        ("much metadata", patched(16, &u64::MAX.to_le_bytes()), "number of metadata entries"),
        ("long name", patched(24, &u64::MAX.to_le_bytes()), "length of a tensor name"),
        ("name past the end", patched(24, &(1u64 << 20).to_le_bytes()), "ends within a tensor name"),
        ("name not utf-8", patched(32, &[0xff]), "not UTF-8"),
        ("many dimensions", patched(33, &9u32.to_le_bytes()), "dimensions of tensor `a`"),
        ("huge dimension", patched(37, &u64::MAX.to_le_bytes()), "which its type f32 cannot have"),
        ("outside", new().tensor("a", &[64], 0, 0).file(32), "`a` lies outside"),
        ("offset overflows", new().tensor("a", &[4], 0, u64::MAX - 31).file(32), "`a` lies outside"),
        ("unaligned", new().tensor("a", &[4], 0, 4).file(64), "`a` is not aligned"),
        ("overlap", new().tensor("a", &[16], 0, 0).tensor("b", &[4], 0, 32).file(128), "`b` overlaps"),
        ("duplicate", new().tensor("a", &[4], 0, 0).tensor("a", &[4], 0, 32).file(128), "`a` is there twice"),
        ("row is no whole block", new().tensor("a", &[33], 8, 0).file(64), "type q8_0 cannot have"),
        ("duplicate key", new().meta("k", 7, &[1]).meta("k", 7, &[1]).file(0), "`k` is there twice"),
        ("unknown value type", new().meta("k", 13, &[1]).file(0), "unsupported type 13"),
        ("array past the end", new().meta("k", 9, &huge_array).file(0), "ends within metadata `k`"),
        ("array of arrays", new().meta("k", 9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).file(0), "unsupported type 9"),
        ("odd alignment", new().meta("general.alignment", 4, &48u32.to_le_bytes()).file(0), "alignment 48"),
        ("zero alignment", new().meta("general.alignment", 4, &0u32.to_le_bytes()).file(0), "alignment 0"),
    ];
    for (what, bytes, message) in cases {
        let error = parse(&bytes).expect_err(what).to_string();
        assert!(error.contains(message), "{what}: {error}");
    }
}

#[test]
fn a_type_that_is_not_stored_keeps_its_name() {
    let gguf = parse(&Writer::default().tensor("a", &[256], 10, 0).file(96)).unwrap();
    assert_eq!(gguf.tensors[0].1.element, ElementType::Other("Q2_K".to_owned()));
}

proptest! {
    #[test]
    fn mutations_never_panic_and_what_is_accepted_lies_within(at in 0usize..200, byte: u8, cut in 0usize..300) {
        let mut file = Writer::default().meta("k", 8, b"\x02\0\0\0\0\0\0\0ab").tensor("a", &[32, 2], 8, 0).tensor("b", &[4], 0, 96).file(128);
        let len = file.len();
        file[at % len] = byte;
        file.truncate(cut.max(1));
        if let Ok(gguf) = parse(&file) {
            for (_, entry) in gguf.tensors {
                prop_assert!(entry.start + entry.len <= file.len());
            }
        }
    }
}
