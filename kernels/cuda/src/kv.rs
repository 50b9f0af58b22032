//! KV pages on a card. Layouts: `kernels/cuda/attend.cu`.

use std::ops::Range;
use std::sync::Arc;

use crate::chunk;
use crate::decode;
use crate::driver::{Address, Driver};
use crate::memory::Memory;
use ashlar_kernels::ops::{KvFormat, KvShape, PackError};

/// Elements of a head at most: what a warp holds in registers.
pub(crate) const HEAD_MAX: usize = 512;

/// Keys and values of all slots.
#[derive(Debug)]
pub struct Kv {
    shape: KvShape,
    slot_count: usize,
    memory: Memory,
}

impl Kv {
    pub(crate) fn new(driver: &Arc<dyn Driver>, shape: KvShape, slot_count: usize) -> Result<Self, PackError> {
        if shape.head_dim > HEAD_MAX {
            return Err(PackError::Device(format!("a head of {} elements: the card's kernels take up to {HEAD_MAX}", shape.head_dim)));
        }
        for kernel in [decode::any_of(shape.head_dim, shape.format), chunk::any_of(shape.head_dim, shape.format)].into_iter().flatten() {
            driver.prepare(kernel)?;
        }
        let memory = Memory::new(driver, shape.page_bytes() * slot_count)?;
        driver.zero(memory.address(), memory.bytes())?;
        Ok(Self { shape, slot_count, memory })
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn slot_count(&self) -> usize {
        self.slot_count
    }

    /// Where keys, values, and scales of both begin; a format without scales has none there.
    pub(crate) fn sections(&self) -> [Address; 4] {
        let tokens = self.shape.kv_heads * self.shape.page_tokens * self.slot_count;
        let elements = tokens * self.shape.head_dim * self.shape.format.element_bytes();
        let scales = tokens * self.shape.format.scale_bytes();
        let at = |range: Range<usize>| self.memory.at(range.start, range.len());
        [
            at(0..elements),
            at(elements..2 * elements),
            at(2 * elements..2 * elements + scales),
            at(2 * elements + scales..2 * elements + 2 * scales),
        ]
    }

    /// Entries that store and attend in this format.
    pub(crate) fn entries(&self) -> [&'static str; 2] {
        match self.shape.format {
            KvFormat::F32 => ["kv_write_f32", "attend_f32"],
            KvFormat::Bf16 => ["kv_write_bf16", "attend_bf16"],
            KvFormat::Int8 => ["kv_write_int8", "attend_int8"],
        }
    }
}
