//! How often each symbol is expected, in 2,048ths, and the table that decodes by it. A model is made once a tensor, so that its cost is
//! that of a tensor and a chunk has none.

use super::EncodingError;

/// Frequencies of a model sum up to `1 << SCALE_BITS`.
pub(super) const SCALE_BITS: u32 = 11;
pub(super) const SCALE: usize = 1 << SCALE_BITS;
/// Models of one tensor: one for each context of its first plane, one for each other plane.
pub(super) const MODELS_MAX: usize = 16;

const BAD: EncodingError = EncodingError::Prelude("symbol model");

/// How often each byte occurred.
pub(super) type Counts = [u32; 256];

/// A share of each symbol: at least 1 of [`SCALE`] for each that occurs, 0 for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) frequencies: [u16; 256],
}

impl Model {
    /// Shares in proportion to `counts`, of which one at least is not zero. What rounding leaves over or lacks falls on the most
    /// frequent symbols, where it costs least.
    pub(super) fn of(counts: &Counts) -> Self {
        let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        assert!(total > 0, "a model is of symbols that occur");
        let mut frequencies = counts.map(|count| match count {
            0 => 0,
            count => u16::try_from((u64::from(count) * SCALE as u64 + total / 2) / total).expect("a share of SCALE").max(1),
        });
        loop {
            let sum: usize = frequencies.iter().map(|f| usize::from(*f)).sum();
            let largest = (0..256).max_by_key(|s| frequencies[*s]).expect("256 symbols");
            match sum.cmp(&SCALE) {
                std::cmp::Ordering::Equal => return Self { frequencies },
                std::cmp::Ordering::Less => frequencies[largest] += u16::try_from(SCALE - sum).expect("less than SCALE"),
                // One at a time: at most 256 rounds, and no symbol is taken below 1 while a larger one is there.
                std::cmp::Ordering::Greater => frequencies[largest] -= 1,
            }
        }
    }

    /// Appends the model: for each symbol in turn its frequency in one byte below 128, else in two (low seven bits with the top bit
    /// set, then the rest); a zero is followed by how many more zeros follow it.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let mut at = 0;
        while at < 256 {
            let frequency = self.frequencies[at];
            at += 1;
            if frequency >= 128 {
                out.extend_from_slice(&[frequency as u8 | 128, (frequency >> 7) as u8]);
            } else {
                out.push(frequency as u8);
            }
            if frequency == 0 {
                let more = self.frequencies[at..].iter().take_while(|f| **f == 0).count();
                out.push(u8::try_from(more).expect("fewer than 256 symbols"));
                at += more;
            }
        }
    }

    /// Takes a model off the start of `bytes`.
    pub(super) fn read(bytes: &mut &[u8]) -> Result<Self, EncodingError> {
        let mut frequencies = [0; 256];
        let mut take = || bytes.split_off_first().copied().ok_or(BAD);
        let (mut at, mut sum) = (0, 0);
        while at < 256 {
            let low = take()?;
            match low {
                0 => at += 1 + usize::from(take()?),
                1..128 => frequencies[at] = u16::from(low),
                _ => frequencies[at] = u16::from(low & 127) | u16::from(take()?) << 7,
            }
            if low != 0 {
                sum += usize::from(frequencies[at]);
                if frequencies[at] == 0 || sum > SCALE {
                    return Err(BAD);
                }
                at += 1;
            }
        }
        if at == 256 && sum == SCALE { Ok(Self { frequencies }) } else { Err(BAD) }
    }
}

/// What decodes: for each model (first index, times [`SCALE`]) and each slot of it, the symbol (bits 0..8), its frequency less one
/// (8..19) and how far into the symbol's share the slot lies (20..32). Room for 1, 2, 4, 8 or 16 models.
#[derive(Clone)]
pub(super) struct Tables(Vec<u32>);

impl Tables {
    pub(super) fn of(models: &[Model]) -> Self {
        let mut entries = Vec::with_capacity(models.len().next_power_of_two() * SCALE);
        for model in models {
            for (symbol, frequency) in model.frequencies.iter().enumerate().filter(|(_, frequency)| **frequency > 0) {
                let entry = symbol as u32 | u32::from(frequency - 1) << 8;
                entries.extend((0..u32::from(*frequency)).map(|offset| entry | offset << 20));
            }
        }
        entries.resize(models.len().next_power_of_two() * SCALE, 0);
        Self(entries)
    }

    /// The entries.
    #[inline]
    pub(super) fn entries(&self) -> &[u32] {
        &self.0
    }
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tables")
    }
}
