//! Bounded little-endian reading of bytes that nobody vouches for. Nothing is allocated on the word of the input alone.

/// The input ends before what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended;

/// A position in bytes.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Starts at the beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// When fewer are left.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Ended> {
        let end = self.at.checked_add(len).ok_or(Ended)?;
        let taken = self.bytes.get(self.at..end).ok_or(Ended)?;
        self.at = end;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// When fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Ended> {
        Ok(self.take(N)?.try_into().expect("took N bytes"))
    }

    /// A u32.
    ///
    /// # Errors
    /// When fewer than 4 bytes are left.
    pub fn u32(&mut self) -> Result<u32, Ended> {
        self.array().map(u32::from_le_bytes)
    }

    /// A u64.
    ///
    /// # Errors
    /// When fewer than 8 bytes are left.
    pub fn u64(&mut self) -> Result<u64, Ended> {
        self.array().map(u64::from_le_bytes)
    }
}
