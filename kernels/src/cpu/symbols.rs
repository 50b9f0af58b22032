//! Symbols out of range asymmetric numeral systems (Duda, arXiv 1311.2540, section 3): 64 interleaved states of 32 bits over one stream of 16-bit
//! words. Symbol i is of state `i % 64`. With s its state and t the start of its model's table:
//!
//! `e = tables[(t | (s & 2047)) % tables.len()]`, the symbol is `e & 255`, `s = ((e >> 8 & 2047) + 1) * (s >> 11) + (e >> 20)`, and if `s < 65536`: `s = s << 16 | next word`.
//!
//! Limited by the table's look-ups, a gather of 16 on AVX-512 and of 8 on AVX2; `reference::decode_symbols` is the same a symbol at a time, and takes over where
//! less than a group of symbols or of words is left. Integers only: all instruction sets give the same bytes.

use super::isa::Isa;
use crate::reference::{self, SYMBOL_STATES, SymbolCode};

/// Decodes `out.len()` symbols and returns how many bytes of `code.words` that took; `None` if they end too early. Whatever the bytes,
/// nothing else goes wrong. `states` are left as after the last symbol.
///
/// # Panics
/// If the machine lacks the instruction set, there is not one start for each symbol, or the tables have another length than [`SymbolCode`] says.
pub fn decode_symbols(isa: Isa, code: &SymbolCode<'_>, states: &mut [u32; SYMBOL_STATES], out: &mut [u8]) -> Option<usize> {
    assert!(isa.available(), "this machine does not run {isa:?}");
    code.check(out.len());
    let (symbols, bytes) = match isa {
        // SAFETY: `available` found AVX-512 F, BW and VL, which both of these stand for.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512Vnni => unsafe { avx512_decode_symbols(code, states, out) },
        // SAFETY: `available` found AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni | Isa::Avx2 => unsafe { avx2_decode_symbols(code, states, out) },
        _ => (0, 0),
    };
    let rest = SymbolCode { tables: code.tables, starts: &code.starts[symbols..], words: &code.words[bytes..] };
    Some(bytes + reference::decode_symbols(&rest, states, &mut out[symbols..])?)
}

/// Whole groups of 64 symbols, as long as a word for each is left. Returns symbols decoded and bytes taken.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,popcnt")]
fn avx512_decode_symbols(code: &SymbolCode<'_>, states: &mut [u32; SYMBOL_STATES], out: &mut [u8]) -> (usize, usize) {
    use std::arch::x86_64::*;
    const LANES: usize = 16;
    let slots = _mm512_set1_epi32(2047);
    let entries = _mm512_set1_epi32(code.tables.len() as i32 - 1);
    let one = _mm512_set1_epi32(1);
    let low = _mm512_set1_epi32(1 << 16);
    let mut quarters = [_mm512_setzero_si512(); SYMBOL_STATES / LANES];
    for (quarter, states) in quarters.iter_mut().zip(states.as_chunks::<LANES>().0) {
        // SAFETY: `states` has 16 elements.
        *quarter = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    let (mut symbols, mut bytes) = (0, 0);
    let groups = code.starts.as_chunks::<SYMBOL_STATES>().0.iter().zip(out.as_chunks_mut::<SYMBOL_STATES>().0);
    for (starts, out) in groups {
        if code.words.len() - bytes < 2 * SYMBOL_STATES {
            break;
        }
        for quarter in 0..SYMBOL_STATES / LANES {
            let state = quarters[quarter];
            // SAFETY: `starts` has 64 elements.
            let start = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(starts.as_ptr().add(LANES * quarter).cast()) });
            let index = _mm512_and_si512(_mm512_or_si512(start, _mm512_and_si512(state, slots)), entries);
            // SAFETY: an index was cut to the length of the tables, a power of two (`check`).
            let entry = unsafe { _mm512_i32gather_epi32::<4>(index, code.tables.as_ptr().cast()) };
            let frequency = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32::<8>(entry), slots), one);
            let upper = _mm512_mullo_epi32(frequency, _mm512_srli_epi32::<11>(state));
            let next = _mm512_add_epi32(upper, _mm512_srli_epi32::<20>(entry));
            let is_low = _mm512_cmplt_epu32_mask(next, low);
            // SAFETY: 128 bytes were left before this group, of which each earlier quarter took at most 32.
            let words = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(code.words.as_ptr().add(bytes).cast()) });
            let refill = _mm512_maskz_expand_epi32(is_low, words);
            quarters[quarter] = _mm512_or_si512(_mm512_mask_slli_epi32::<16>(next, is_low, next), refill);
            bytes += 2 * is_low.count_ones() as usize;
            // SAFETY: `out` has 64 elements.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().add(LANES * quarter).cast(), _mm512_cvtepi32_epi8(entry)) };
        }
        symbols += SYMBOL_STATES;
    }
    for (quarter, states) in quarters.iter().zip(states.as_chunks_mut::<LANES>().0) {
        // SAFETY: `states` has 16 elements.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), *quarter) };
    }
    (symbols, bytes)
}

/// For each mask of eight lanes, which of eight words each lane takes: the first word for the first lane of the mask, and so on.
#[cfg(target_arch = "x86_64")]
static PLACES: [[u32; 8]; 256] = {
    let mut places = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut taken) = (0, 0);
        while lane < 8 {
            places[mask][lane] = taken;
            taken += (mask >> lane & 1) as u32;
            lane += 1;
        }
        mask += 1;
    }
    places
};

/// As `avx512_decode_symbols`, in eight registers of eight states.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
fn avx2_decode_symbols(code: &SymbolCode<'_>, states: &mut [u32; SYMBOL_STATES], out: &mut [u8]) -> (usize, usize) {
    use std::arch::x86_64::*;
    let slots = _mm256_set1_epi32(2047);
    let entries = _mm256_set1_epi32(code.tables.len() as i32 - 1);
    let one = _mm256_set1_epi32(1);
    let zero = _mm256_setzero_si256();
    let lowest_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    let mut eighths = [zero; SYMBOL_STATES / 8];
    for (eighth, states) in eighths.iter_mut().zip(states.as_chunks::<8>().0) {
        // SAFETY: `states` has 8 elements.
        *eighth = unsafe { _mm256_loadu_si256(states.as_ptr().cast()) };
    }
    let (mut symbols, mut bytes) = (0, 0);
    let groups = code.starts.as_chunks::<SYMBOL_STATES>().0.iter().zip(out.as_chunks_mut::<SYMBOL_STATES>().0);
    for (starts, out) in groups {
        if code.words.len() - bytes < 2 * SYMBOL_STATES {
            break;
        }
        for eighth in 0..SYMBOL_STATES / 8 {
            let state = eighths[eighth];
            // SAFETY: `starts` has 64 elements.
            let start = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(starts.as_ptr().add(8 * eighth).cast()) });
            let index = _mm256_and_si256(_mm256_or_si256(start, _mm256_and_si256(state, slots)), entries);
            // SAFETY: an index was cut to the length of the tables, a power of two (`check`).
            let entry = unsafe { _mm256_i32gather_epi32::<4>(code.tables.as_ptr().cast(), index) };
            let frequency = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32::<8>(entry), slots), one);
            let upper = _mm256_mullo_epi32(frequency, _mm256_srli_epi32::<11>(state));
            let next = _mm256_add_epi32(upper, _mm256_srli_epi32::<20>(entry));
            // Below 2^16 is where the upper half is zero; there is no unsigned comparison.
            let is_low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(next), zero);
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(is_low)) as usize & 255;
            // SAFETY: 128 bytes were left before this group, of which each earlier eighth took at most 16.
            let words = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(code.words.as_ptr().add(bytes).cast()) });
            // SAFETY: an entry of PLACES has 8 elements.
            let places = unsafe { _mm256_loadu_si256(PLACES[mask].as_ptr().cast()) };
            let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(next), _mm256_permutevar8x32_epi32(words, places));
            eighths[eighth] = _mm256_blendv_epi8(next, refilled, is_low);
            bytes += 2 * mask.count_ones() as usize;
            let packed = _mm256_shuffle_epi8(entry, lowest_bytes);
            let halves = [_mm256_extract_epi32::<0>(packed), _mm256_extract_epi32::<4>(packed)];
            out[8 * eighth..8 * eighth + 4].copy_from_slice(&halves[0].to_le_bytes());
            out[8 * eighth + 4..8 * eighth + 8].copy_from_slice(&halves[1].to_le_bytes());
        }
        symbols += SYMBOL_STATES;
    }
    for (eighth, states) in eighths.iter().zip(states.as_chunks_mut::<8>().0) {
        // SAFETY: `states` has 8 elements.
        unsafe { _mm256_storeu_si256(states.as_mut_ptr().cast(), *eighth) };
    }
    (symbols, bytes)
}
