//! What a block was measured to cost on a device: time by rows, a record beside the block for each device (`store/profiles.rs`). Engines read
//! those of the blocks that they load. Who measures is not here; it does no IO. Bytes: docs/block-format.md, "Profiles".

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ashlar_kernels::ops::KvFormat;
use serde::{Deserialize, Serialize};

use crate::canonical;
use crate::digest::Digest;

/// Largest record, in bytes: `POINTS_MAX` times, each of three numbers with their names, and what they are of.
pub const PROFILE_BYTES_MAX: u64 = 16 << 10;
/// Numbers of rows that a record has, at most.
pub const POINTS_MAX: usize = 64;
/// Rows of a measured batch, at most.
pub const ROWS_MAX: u32 = 4096;
/// Longest key of a device, in bytes.
pub const DEVICE_BYTES_MAX: usize = 128;
/// Of these, bytes that the processor's name may take.
const PROCESSOR_BYTES_MAX: usize = 64;
/// Longest version of the program that measured, in bytes.
const VERSION_BYTES_MAX: usize = 64;
/// Tokens of context, at most.
const CONTEXT_TOKENS_MAX: u32 = 1 << 20;
/// Longest time of a batch, in microseconds: an hour.
const MICROS_MAX: f64 = 3.6e9;

/// A kind of device as a part of an object's key: processor, instruction set, threads and arithmetic, in `[a-z0-9.-]{1,128}`, beginning with a
/// letter or digit. Blocks cost alike on devices of one key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceKey(String);

/// The text is no key of a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device: 1 to {DEVICE_BYTES_MAX} small letters, digits, `.` and `-`, and not the last two at the start")]
pub struct ParseDeviceError(String);

impl DeviceKey {
    /// The key of a processor, by the name that it gives itself, and what a backend says of itself.
    pub fn new(processor: &str, backend: &str) -> Self {
        let (processor, backend) = (plain(processor, PROCESSOR_BYTES_MAX), plain(backend, DEVICE_BYTES_MAX - PROCESSOR_BYTES_MAX - 1));
        let parts: Vec<String> = [processor, backend].into_iter().filter(|part| !part.is_empty()).collect();
        Self(if parts.is_empty() { "unknown".to_owned() } else { parts.join("-") })
    }

    /// As it stands in keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A name in small letters, digits and points, with `-` for whatever else stands between; at most so many bytes.
fn plain(name: &str, bytes_max: usize) -> String {
    let mut plain = String::new();
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        if plain.len() == bytes_max {
            break;
        }
        match c {
            'a'..='z' | '0'..='9' => plain.push(c),
            '.' if !plain.is_empty() => plain.push(c),
            _ if !plain.is_empty() && !plain.ends_with('-') => plain.push('-'),
            _ => {}
        }
    }
    plain.trim_end_matches(['-', '.']).to_owned()
}

impl FromStr for DeviceKey {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-');
        let is_key = text.len() <= DEVICE_BYTES_MAX && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.bytes().all(is_inner);
        if is_key { Ok(Self(text.to_owned())) } else { Err(ParseDeviceError(text.chars().take(200).collect())) }
    }
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for DeviceKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for DeviceKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Times of one block on one kind of device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The block.
    pub block: Digest,
    /// The device.
    pub device: DeviceKey,
    /// Times, by rows ascending.
    pub points: Vec<Point>,
    /// Tokens that each sequence of a batch had before it.
    pub context_tokens: u32,
    /// Sequences of a batch at most: more rows are so many sequences with several rows each. The head computes logits of one row a sequence.
    pub sequences_max: u32,
    /// How keys and values were held.
    pub kv_format: KvFormat,
    /// Of the program that measured. Printable ASCII.
    pub version: String,
    /// Unix time, in milliseconds.
    pub created_ms: u64,
}

/// The time of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Rows of the batch.
    pub rows: u32,
    /// Median time of the runs, in microseconds.
    pub micros: f64,
    /// Runs that were measured.
    pub runs: u32,
}

/// What the file holds: the profile, and the BLAKE3 of its canonical text, as its key says nothing of what it holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    checksum: Digest,
    profile: Profile,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is no JSON of this kind.
    #[error("this build cannot read it: {0}")]
    Json(#[from] serde_json::Error),
    /// Something changed in it.
    #[error("its checksum is that of another text")]
    Checksum,
    /// No times, or too many.
    #[error("it has {0} times, not 1 to {POINTS_MAX}")]
    Count(usize),
    /// Rows that do not ascend from 1.
    #[error("its rows do not ascend within 1 to {ROWS_MAX}")]
    Rows,
    /// A version that cannot be shown.
    #[error("its version is not 1 to {VERSION_BYTES_MAX} characters of printable ASCII")]
    Version,
    /// A number that no measurement can have.
    #[error("its {field} is {value}")]
    Number {
        /// Which.
        field: &'static str,
        /// The number.
        value: f64,
    },
}

impl Profile {
    /// Checks that a measurement can have these numbers.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ProfileError> {
        if !(1..=POINTS_MAX).contains(&self.points.len()) {
            return Err(ProfileError::Count(self.points.len()));
        }
        if self.version.is_empty() || self.version.len() > VERSION_BYTES_MAX || !self.version.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(ProfileError::Version);
        }
        let mut before = 0;
        for point in &self.points {
            if point.rows <= before || point.rows > ROWS_MAX {
                return Err(ProfileError::Rows);
            }
            before = point.rows;
            // Not a number is not within either.
            if !(point.micros > 0.0 && point.micros <= MICROS_MAX) {
                return Err(ProfileError::Number { field: "time", value: point.micros });
            }
            if point.runs == 0 {
                return Err(ProfileError::Number { field: "number of runs", value: 0.0 });
            }
        }
        for (field, value, least, most) in
            [("context", self.context_tokens, 0, CONTEXT_TOKENS_MAX), ("most sequences", self.sequences_max, 1, ROWS_MAX)]
        {
            if !(least..=most).contains(&value) {
                return Err(ProfileError::Number { field, value: f64::from(value) });
            }
        }
        Ok(())
    }

    /// Reads a record, and checks it.
    ///
    /// # Errors
    /// When it is no record, was changed, or has numbers that none can have.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        let Sealed { checksum, profile } = serde_json::from_slice(bytes)?;
        profile.check()?;
        if canonical::digest(&profile) != checksum {
            return Err(ProfileError::Checksum);
        }
        Ok(profile)
    }

    /// The record's one text.
    pub fn to_bytes(&self) -> Vec<u8> {
        canonical::to_bytes(&Sealed { checksum: canonical::digest(self), profile: self.clone() })
    }

    /// Microseconds of a batch of so many rows: on a straight line between those that were measured, as long as the first with fewer, as long for
    /// each row as the last with more.
    pub fn micros(&self, rows: u32) -> f64 {
        let (first, last) = (self.points[0], self.points[self.points.len() - 1]);
        if rows <= first.rows {
            return first.micros;
        }
        let Some(above) = self.points.iter().position(|point| point.rows >= rows) else {
            return last.micros * f64::from(rows) / f64::from(last.rows);
        };
        let (low, high) = (self.points[above - 1], self.points[above]);
        low.micros + (high.micros - low.micros) * f64::from(rows - low.rows) / f64::from(high.rows - low.rows)
    }

    /// Times by rows.
    pub fn times(&self) -> Vec<(u32, Duration)> {
        self.points.iter().map(|point| (point.rows, Duration::from_secs_f64(point.micros / 1e6))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        Profile {
            block: Digest::of(b"block"),
            device: DeviceKey::new("Some(R) Processor @ 2.10GHz", "cpu, avx512, 2 threads"),
            points: vec![Point { rows: 1, micros: 12.5, runs: 7 }, Point { rows: 64, micros: 80.25, runs: 7 }],
            context_tokens: 256,
            sequences_max: 32,
            kv_format: KvFormat::F32,
            version: "0.1.0".to_owned(),
            created_ms: 1,
        }
    }

    #[test]
    fn devices_are_named_so_that_any_store_takes_the_key() {
        assert_eq!(profile().device.as_str(), "some-r-processor-2.10ghz-cpu-avx512-2-threads");
        assert_eq!(DeviceKey::new("", "cpu").as_str(), "cpu");
        assert_eq!(DeviceKey::new("..//", "\u{e4}").as_str(), "unknown");
        let long = DeviceKey::new(&"Ab_".repeat(99), &"x/".repeat(99));
        assert!(long.as_str().len() <= DEVICE_BYTES_MAX && long.as_str().contains("ab-ab") && long.as_str().ends_with("x-x"), "{long}");
        for key in [long.as_str(), "unknown", "a.b-c"] {
            assert_eq!(key.parse::<DeviceKey>().unwrap().as_str(), key);
        }
        for bad in ["", ".", "-a", "../a", "a/b", "A", "a b", "\u{e4}", "a".repeat(129).as_str()] {
            assert!(bad.parse::<DeviceKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_record_is_one_text_and_back() {
        let bytes = profile().to_bytes();
        assert_eq!(Profile::parse(&bytes).unwrap(), profile());
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with(r#"{"checksum":""#) && text.contains(r#""points":[{"micros":12.5,"rows":1,"runs":7},"#), "{text}");
        let changed = text.replace("12.5", "12.6");
        assert_eq!(Profile::parse(changed.as_bytes()).unwrap_err().to_string(), "its checksum is that of another text");
        let more = text.replace(r#""runs":7"#, r#""runs":7,"more":1"#);
        assert!(Profile::parse(more.as_bytes()).unwrap_err().to_string().starts_with("this build cannot read it: unknown field `more`"));
    }

    #[test]
    fn times_between_measured_rows_lie_on_a_line() {
        let profile = profile();
        let said = [0, 1, 22, 64, 128].map(|rows| profile.micros(rows));
        assert_eq!(said, [12.5, 12.5, 12.5 + (80.25 - 12.5) / 3.0, 80.25, 160.5]);
        assert_eq!(profile.times(), [(1, Duration::from_nanos(12_500)), (64, Duration::from_nanos(80_250))]);
    }

    #[test]
    fn the_largest_record_is_within_the_limit() {
        let points = (0..POINTS_MAX as u32).map(|i| Point { rows: ROWS_MAX - 64 + i, micros: 1_234_567.123_456_789 / 3.0, runs: u32::MAX });
        let device = DeviceKey::new(&"p".repeat(99), &"b".repeat(99));
        let largest =
            Profile { points: points.collect(), device, version: "v".repeat(VERSION_BYTES_MAX), created_ms: u64::MAX, ..profile() };
        assert!(largest.check().is_ok() && (largest.to_bytes().len() as u64) < PROFILE_BYTES_MAX);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused_by_name() {
        let refused = |change: fn(&mut Profile)| {
            let mut profile = profile();
            change(&mut profile);
            let error = profile.check().unwrap_err().to_string();
            // Sealed or not.
            let read = if error.contains("inf") || error.contains("NaN") {
                error.clone()
            } else {
                Profile::parse(&profile.to_bytes()).unwrap_err().to_string()
            };
            assert_eq!(error, read);
            error
        };
        assert_eq!(refused(|profile| profile.points.clear()), "it has 0 times, not 1 to 64");
        assert_eq!(refused(|profile| profile.points = vec![profile.points[0]; 65]), "it has 65 times, not 1 to 64");
        assert_eq!(refused(|profile| profile.points[1].rows = 1), "its rows do not ascend within 1 to 4096");
        assert_eq!(refused(|profile| profile.points[0].rows = 0), "its rows do not ascend within 1 to 4096");
        assert_eq!(refused(|profile| profile.points[1].rows = 4097), "its rows do not ascend within 1 to 4096");
        assert_eq!(refused(|profile| profile.points[0].micros = 0.0), "its time is 0");
        assert_eq!(refused(|profile| profile.points[0].micros = f64::NAN), "its time is NaN");
        assert_eq!(refused(|profile| profile.points[0].micros = f64::INFINITY), "its time is inf");
        assert_eq!(refused(|profile| profile.points[0].micros = 1e10), "its time is 10000000000");
        assert_eq!(refused(|profile| profile.points[0].runs = 0), "its number of runs is 0");
        assert_eq!(refused(|profile| profile.context_tokens = u32::MAX), "its context is 4294967295");
        assert_eq!(refused(|profile| profile.sequences_max = 0), "its most sequences is 0");
        let version = "its version is not 1 to 64 characters of printable ASCII";
        assert_eq!(refused(|profile| profile.version.clear()), version);
        assert_eq!(refused(|profile| profile.version = "a\nb".to_owned()), version);
    }
}
