//! Which kernels attend: rows that read the same pages in tiles (`chunk.rs`), others row by row, by those made for decodes (`decode.rs`) where there are any for the
//! shape, else in the plain form of `attend.cu`. All give the bits of docs/numerics.md's rule 6.

use ashlar_kernels::ops::{AttentionShape, Query, SEGMENT_TOKENS};

use crate::Cuda;
use crate::chunk;
use crate::decode;
use crate::driver::{Address, Argument, DriverError};
use crate::kv::Kv;
use crate::plan::{Plan, Together, query_bytes, tile_bytes};

impl Cuda {
    /// Attends for rows at `qkv`, `[queries][qkv_width]`, into `out`, `[queries][heads][head_dim]`; pages and tables were checked.
    ///
    /// # Errors
    /// When the card fails.
    pub(crate) fn attend_rows(
        &self,
        (out, qkv, kv): (Address, Address, &Kv),
        shape: &AttentionShape,
        queries: &[Query],
        tables: &[u32],
    ) -> Result<(), DriverError> {
        let shared_bytes_max = self.driver.shared_bytes_max();
        let (chunk, decode) = (chunk::of(shape, shared_bytes_max), decode::of(shape, shared_bytes_max));
        let together = match (chunk, decode) {
            (None, _) => Together::Nothing,
            (Some(chunk), Some(_)) if chunk.has_split() => Together::ChunksAndPrefixes,
            (Some(_), _) => Together::Chunks,
        };
        let plan = Plan::of(shape, queries, tables, together);
        // Passes and splits follow each other, so one place serves them all.
        let more = decode.map_or(0, |kernels| kernels.scratch_bytes(shape, &plan.alone)).max(plan.scratch_bytes(shape));
        let ([queries_at, tables_at, tiles_at], mut scratch) = self.stage([&plan.queries, tables, &plan.tiles], more)?;
        let partial = scratch.take(more);
        if let Some(kernel) = chunk {
            kernel.run(self, out, (qkv, kv), shape, &plan, [queries_at, tables_at, tiles_at])?;
        }
        if let (Some(chunk), Some(decode)) = (chunk, decode) {
            for pass in &plan.passes {
                let (queries_at, tiles_at) = (queries_at.plus(query_bytes(pass.rows.start)), tiles_at.plus(tile_bytes(pass.tiles.start)));
                chunk.run_split(self, partial, (qkv, kv), shape, pass, [queries_at, tables_at, tiles_at])?;
                let rows = (pass.rows.len(), pass.shared.start..pass.segments);
                decode.run_split(self, partial, (out, qkv, kv), shape, rows, [queries_at, tables_at])?;
            }
        }
        if plan.alone.is_empty() {
            return Ok(());
        }
        let alone_at = queries_at.plus(query_bytes(plan.first_alone()));
        if let Some(kernels) = decode {
            return kernels.run(self, partial, (out, qkv, kv), shape, &plan.alone, [alone_at, tables_at]);
        }
        let [keys, values, key_scales, value_scales] = kv.sections().map(Argument::Address);
        let arguments = [
            out.into(),
            qkv.into(),
            keys,
            values,
            key_scales,
            value_scales,
            alone_at.into(),
            tables_at.into(),
            shape.kv.kv_heads.into(),
            shape.kv.head_dim.into(),
            shape.kv.page_tokens.into(),
            Argument::Int(chunk::window(shape)),
            shape.scale.into(),
            shape.softcap.unwrap_or(0.0).into(),
        ];
        let shared = (shape.kv.head_dim + SEGMENT_TOKENS) * size_of::<f32>();
        self.launch(kv.entries()[1], [shape.heads as u32, plan.alone.len() as u32, 1], 32, shared, &arguments)
    }
}
