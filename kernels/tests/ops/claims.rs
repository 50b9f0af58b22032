//! What the benchmark claims of kernels can be measured. Here and not beside it, so that the crate's own tests need not compile every kernel again.

use std::time::Duration;

use ashlar_kernels::bench::attention::Decode;
use ashlar_kernels::bench::claims::{Claim, ClaimOptions, SMOLLM2};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::KvFormat;

#[test]
fn a_claim_of_each_kind_is_measured() {
    let cpu = |isa| Cpu::new(CpuOptions { threads: 1, isa, ..CpuOptions::default() });
    let (here, lower) = (cpu(None), cpu(Some(Isa::Scalar)));
    let options = ClaimOptions { rounds: 1, budget: Duration::from_micros(1), rotate_bytes: 1 << 20 };
    let dtype = Dtype::Int4 { group: 32 };
    let claims = [
        Claim::Decode { shapes: SMOLLM2, dtype },
        Claim::Runs { dtype },
        Claim::Attend(Decode { heads: 2, kv_heads: 1, head_dim: 8, format: KvFormat::Int8, rows: 2, tokens: 17 }),
        Claim::Rows { shapes: SMOLLM2, dtype, row_count: 2 },
        Claim::Rows { shapes: SMOLLM2, dtype: Dtype::Bf16, row_count: 2 },
        Claim::OneMoreRow { dtype, row_count: 1 },
        Claim::Dispatch { dtype, row_count: 1 },
    ];
    for claim in claims {
        let seen = claim.measure(&here, &lower, &options).unwrap();
        assert!(seen.median.is_finite() && seen.median > 0.0, "{claim}: {seen:?}");
    }
}
