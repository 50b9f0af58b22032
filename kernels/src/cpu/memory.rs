//! Device memory of the CPU backend: zeroed, 64-byte aligned, and untouched by us until it is used (the kernel gives
//! zero pages on first touch). Also the one way in which threads write disjoint parts of one slice.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use crate::ops::PackError;

/// Element types for which every pattern of bits is a value.
pub(super) trait Element: Copy + Send + Sync + 'static {}
impl Element for f32 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for u16 {}
impl Element for u8 {}
impl Element for i8 {}

/// A fixed number of elements, 64-byte aligned.
pub(super) struct Aligned<T> {
    /// What the allocator gave; `None` if nothing was asked for.
    allocation: Option<(NonNull<u8>, Layout)>,
    /// The first 64-byte border within the allocation; dangling but aligned for `len == 0`.
    start: NonNull<T>,
    len: usize,
}

// SAFETY: Aligned owns its memory, as a Vec does; T is Send and Sync by the bound of Element at construction.
unsafe impl<T: Element> Send for Aligned<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: Element> Sync for Aligned<T> {}

impl<T: Element> Aligned<T> {
    /// Zeroed elements.
    pub(super) fn new(len: usize) -> Result<Self, PackError> {
        if len == 0 {
            return Ok(Self { allocation: None, start: NonNull::dangling(), len: 0 });
        }
        let bytes = len.checked_mul(size_of::<T>()).ok_or(PackError::Memory(usize::MAX))?;
        // A layout that asks for 64-byte alignment would be zeroed by hand, that is touched; so ask for slack instead.
        let layout = bytes.checked_add(ALIGN).and_then(|size| Layout::from_size_align(size, 16).ok()).ok_or(PackError::Memory(bytes))?;
        // SAFETY: the layout's size is not zero.
        let raw = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(PackError::Memory(bytes))?;
        let skip = raw.align_offset(ALIGN);
        // SAFETY: skip < ALIGN, and the allocation has ALIGN bytes more than the elements need.
        let start = unsafe { raw.add(skip) }.cast::<T>();
        advise_huge_pages(start.cast(), bytes);
        Ok(Self { allocation: Some((raw, layout)), start, len })
    }

    /// Takes the values of a slice.
    pub(super) fn from_slice(values: &[T]) -> Result<Self, PackError> {
        let mut out = Self::new(values.len())?;
        out.copy_from_slice(values);
        Ok(out)
    }

    /// Bytes that the elements take.
    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        if let Some((raw, layout)) = self.allocation {
            // SAFETY: the pair came from alloc_zeroed in `new` and is given back once.
            unsafe { dealloc(raw.as_ptr(), layout) }
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `new` made `len` zeroed, hence valid, elements at `start`; self owns them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> std::fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({} elements)", self.len)
    }
}

/// Bytes as elements; panics unless they are aligned for them and whole.
pub(super) fn elements<T: Element>(bytes: &[u8]) -> &[T] {
    assert!(bytes.as_ptr().cast::<T>().is_aligned() && bytes.len().is_multiple_of(size_of::<T>()), "elements lie aligned");
    // SAFETY: alignment and length were asserted, and every pattern of bits is a value of an Element.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
}

/// As [`elements`], to be written.
pub(super) fn elements_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    assert!(bytes.as_ptr().cast::<T>().is_aligned() && bytes.len().is_multiple_of(size_of::<T>()), "elements lie aligned");
    // SAFETY: as in `elements`; the bytes are borrowed exclusively, and every pattern that is written is a value of u8.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<T>()) }
}

/// A slice that several threads write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a Shared is a borrowed `&mut [T]`; who takes a part promises (see `part`) that nobody else holds it.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Where an element is, or would be.
    #[inline(always)]
    pub(super) fn address(&self, index: usize) -> *const T {
        self.start.wrapping_add(index)
    }

    /// Elements `range`; panics if they are not there.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[inline(always)]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: the range lies within the borrowed slice (asserted); exclusiveness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Weights and KV are walked in long runs: 2 MiB pages spare address translation. A hint; failure changes nothing.
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= 4 * HUGE_PAGE {
        unsafe extern "C" {
            fn madvise(address: *mut core::ffi::c_void, length: usize, advice: core::ffi::c_int) -> core::ffi::c_int;
        }
        const MADV_HUGEPAGE: core::ffi::c_int = 14;
        let skip = start.align_offset(HUGE_PAGE);
        let length = (bytes - skip) / HUGE_PAGE * HUGE_PAGE;
        // SAFETY: the range lies within our own allocation; the advice changes how it is backed, not what it holds.
        unsafe { madvise(start.as_ptr().add(skip).cast(), length, MADV_HUGEPAGE) };
    }
}

/// Gives memory that was freed back to the system, where the allocator keeps it: parsing a tokenizer alone leaves it some 30 MiB.
pub(super) fn release_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> core::ffi::c_int;
        }
        // SAFETY: glibc's function takes no pointer, locks what it looks at, and touches only memory that is free.
        unsafe { malloc_trim(0) };
    }
}

const ALIGN: usize = 64;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_writable() {
        for len in [0, 1, 63, 64, 65, 5_000_000] {
            let mut a = Aligned::<f32>::new(len).unwrap();
            assert_eq!(a.as_ptr() as usize % if len == 0 { 4 } else { 64 }, 0);
            assert!(a.iter().all(|&x| x == 0.0));
            a.fill(1.0);
            assert_eq!(a.len(), len);
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(matches!(Aligned::<f32>::new(usize::MAX / 2), Err(PackError::Memory(_))));
        assert!(matches!(Aligned::<f32>::new(1 << 58), Err(PackError::Memory(_))));
    }
}
