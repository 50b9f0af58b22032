use proptest::prelude::*;

use super::*;

fn file(header: &str, data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_len, 7);
    file
}

#[test]
fn a_well_formed_file_is_read_in_order_of_offsets() {
    let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,2],"data_offsets":[4,12]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
    let tensors = parse(&file(header, 12)).unwrap();
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(tensors[1].1.start, 8 + header.len() + 4);
    assert_eq!((tensors[1].1.len, &tensors[1].1.element), (8, &ElementType::Stored(Dtype::Bf16)));
}

#[test]
fn each_lie_is_refused_by_name() {
    let entry = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "ends within its header"),
        ("only a length", 10u64.to_le_bytes().to_vec(), "ends within its header"),
        ("huge length", u64::MAX.to_le_bytes().to_vec(), "claims"),
        ("truncated header", file("{}", 0)[..9].to_vec(), "ends within its header"),
        (
            "not utf-8",
            {
                let mut f = file("{\"a\":1}", 0);
                f[10] = 0xff;
                f
            },
            "not the JSON",
        ),
        ("no object", file("[]", 0), "not the JSON"),
        ("deep nesting", file(&"[".repeat(100_000), 0), "not the JSON"),
        ("duplicate", file(&format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("a", "F32", "[1]", 4, 8)), 8), "`a` is there twice"),
        ("overlap", file(&format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("b", "F32", "[1]", 2, 6)), 8), "`b` begins at 2"),
        ("hole", file(&format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("b", "F32", "[1]", 8, 12)), 12), "`b` begins at 8"),
        ("wrong dtype", file(&format!("{{{}}}", entry("a", "F31", "[1]", 0, 4)), 4), "unknown dtype `F31`"),
        ("wrong size", file(&format!("{{{}}}", entry("a", "F32", "[2]", 0, 4)), 4), "has 4 bytes"),
        (
            "overflowing shape",
            file(&format!("{{{}}}", entry("a", "F32", "[4294967296,4294967296,4294967296]", 0, 4)), 4),
            "outside the file",
        ),
        ("offsets backwards", file(&format!("{{{}}}", entry("a", "F32", "[1]", 4, 0)), 4), "outside the file"),
        ("offsets outside", file(&format!("{{{}}}", entry("a", "F32", "[1]", 0, 4)), 3), "outside the file"),
        ("trailing bytes", file(&format!("{{{}}}", entry("a", "F32", "[1]", 0, 4)), 5), "describes 4"),
        ("negative shape", file(&format!("{{{}}}", entry("a", "F32", "[-1]", 0, 4)), 4), "not the JSON"),
        ("unknown field", file(r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}}"#, 4), "not the JSON"),
    ];
    for (what, bytes, message) in cases {
        let error = parse(&bytes).expect_err(what).to_string();
        assert!(error.contains(message), "{what}: {error}");
    }
}

proptest! {
    #[test]
    fn whatever_is_accepted_lies_within_the_file(bytes in proptest::collection::vec(any::<u8>(), 0..200), header in ".{0,80}") {
        for bytes in [bytes, file(&header, 3)] {
            for (_, entry) in parse(&bytes).unwrap_or_default() {
                prop_assert!(entry.start + entry.len <= bytes.len());
            }
        }
    }

    #[test]
    fn what_is_written_reads_back(shapes in proptest::collection::vec((1u64..4, 1u64..4), 1..8)) {
        let mut at = 0;
        let entries: Vec<String> = shapes.iter().enumerate().map(|(i, (n, k))| {
            let from = at;
            at += n * k * 2;
            format!(r#""t{i}":{{"dtype":"F16","shape":[{n},{k}],"data_offsets":[{from},{at}]}}"#)
        }).collect();
        let bytes = file(&format!("{{{}}}", entries.join(",")), usize::try_from(at).unwrap());
        let read = parse(&bytes).unwrap();
        prop_assert_eq!(read.len(), shapes.len());
        for ((_, entry), (n, k)) in read.iter().zip(shapes) {
            prop_assert_eq!(&entry.shape, &vec![n, k]);
        }
    }
}
