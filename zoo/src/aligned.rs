//! Memory that tensors are read and decoded into. It is short-lived, a copy of what a device then holds, so pages that were touched once are
//! used again: a page that is new to the process costs more than decoding 4 kB into it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;

/// From here on a piece is mapped by itself, in huge pages where the system has them.
const LARGE_BYTES: usize = 2 << 20;
/// Below, the allocator has pages that were touched.
const KEPT_BYTES_MIN: usize = 64 << 10;
/// Pieces between the two that are kept for the next tensor, together at most.
const SPARE_BYTES_MAX: usize = 32 << 20;

/// Oldest first.
static SPARE: Mutex<VecDeque<Box<[Line]>>> = Mutex::new(VecDeque::new());

#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes that begin at a multiple of 64.
#[derive(Debug)]
pub(crate) struct AlignedBytes {
    room: Room,
    len: usize,
}

#[derive(Debug)]
enum Room {
    Small(Box<[Line]>),
    Large(MmapMut),
}

impl AlignedBytes {
    /// Room for `len` bytes. Whoever asks for it writes all of them: they may be those of another tensor.
    pub(crate) fn to_fill(len: usize) -> Self {
        // Where the system maps nothing more, the allocator says so.
        let large = (len >= LARGE_BYTES).then(|| mapped(len)).flatten();
        Self { room: large.map_or_else(|| Room::Small(small(len)), Room::Large), len }
    }

    /// The bytes, to fill.
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        match &mut self.room {
            Room::Small(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            Room::Large(map) => &mut map[..self.len],
        }
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        match &self.room {
            Room::Small(lines) => &bytemuck::cast_slice(lines)[..self.len],
            Room::Large(map) => &map[..self.len],
        }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        let Room::Small(lines) = &mut self.room else { return };
        let lines = std::mem::take(lines);
        if size_of_val::<[Line]>(&lines) < KEPT_BYTES_MIN {
            return;
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push_back(lines);
        // The oldest go, so that the sizes of a model that is loaded no more make room.
        while bytes_of(&spare) > SPARE_BYTES_MAX {
            spare.pop_front();
        }
    }
}

fn bytes_of(spare: &VecDeque<Box<[Line]>>) -> usize {
    spare.iter().map(|lines| size_of_val::<[Line]>(lines)).sum()
}

fn mapped(len: usize) -> Option<MmapMut> {
    let map = MmapMut::map_anon(len).ok()?;
    // A hint: where the system does not take it, pages are small.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(map)
}

/// One that is spare, long enough and at most an eighth too long, or a new one.
fn small(len: usize) -> Box<[Line]> {
    let lines = len.div_ceil(size_of::<Line>());
    let fits = |spare: &[Line]| (lines..=lines + lines / 8).contains(&spare.len());
    let take = || {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let index = spare.iter().position(|spare| fits(spare))?;
        spare.remove(index)
    };
    let found = if len < KEPT_BYTES_MIN { None } else { take() };
    found.unwrap_or_else(|| vec![Line([0; 64]); lines].into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_there_and_aligned() {
        for len in [0, 1, 64, 65, 4096, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 9 << 20] {
            for fill in [3u8, 7] {
                let mut bytes = AlignedBytes::to_fill(len);
                assert_eq!((bytes.as_ref().len(), bytes.as_mut().len()), (len, len));
                assert!(len == 0 || bytes.as_ref().as_ptr().addr().is_multiple_of(64));
                bytes.as_mut().fill(fill);
                assert!(bytes.as_ref().iter().all(|byte| *byte == fill));
            }
        }
    }

    #[test]
    fn two_at_one_time_have_their_own() {
        let (mut a, mut b) = (AlignedBytes::to_fill(100_000), AlignedBytes::to_fill(100_000));
        a.as_mut().fill(1);
        b.as_mut().fill(2);
        assert!(a.as_ref().iter().all(|byte| *byte == 1));
        drop(a);
        let mut c = AlignedBytes::to_fill(99_000);
        c.as_mut().fill(3);
        assert!(b.as_ref().iter().all(|byte| *byte == 2));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let all: Vec<_> = (0..40).map(|_| AlignedBytes::to_fill(LARGE_BYTES - 64)).collect();
        drop(all);
        let kept = bytes_of(&SPARE.lock().unwrap());
        assert!(kept <= SPARE_BYTES_MAX, "{kept}");
    }
}
