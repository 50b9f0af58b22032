//! `ashlar bench kernels --assert`: measures every claim and fails if one does not hold.

use anyhow::{Context, ensure};
use ashlar_kernels::bench::claims::{self, Claim, ClaimOptions};
use ashlar_kernels::bench::paired::Estimate;
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use serde_json::{Value, json};

use crate::output;

/// Prints each claim as it is measured, and gives back what the JSON holds.
pub(super) fn check(cpu: &Cpu, options: &ClaimOptions) -> anyhow::Result<(Vec<Value>, anyhow::Result<()>)> {
    // The integer layers, for which the choice is held against another, have the same code with and without bf16.
    let same = |isa: Isa| isa == Isa::Avx512Vnni && cpu.isa() == Isa::Avx512Bf16;
    let lower = Isa::ALL.into_iter().skip_while(|isa| *isa != cpu.isa()).skip(1).find(|isa| isa.available() && !same(*isa));
    let lower = lower.map(|isa| Cpu::new(CpuOptions { threads: cpu.threads(), isa: Some(isa), bf16_compute: cpu.bf16_compute() }));
    if lower.is_none() {
        output::line("no instruction set is lower than this one: nothing to hold the choice against")?;
    }
    let (mut reported, mut failed) = (Vec::new(), Vec::new());
    for claim in claims::all() {
        if lower.is_none() && matches!(claim, Claim::Dispatch { .. }) {
            continue;
        }
        let measure = || claim.measure(cpu, lower.as_ref().unwrap_or(cpu), options).with_context(|| format!("measure {claim}"));
        let mut seen = measure()?;
        let mut tries = 1;
        if !claim.bound().holds(&seen) {
            output::line(line("again", &claim, &seen))?;
            (seen, tries) = (measure()?, 2);
        }
        let holds = claim.bound().holds(&seen);
        output::line(line(if holds { "ok" } else { "FAILS" }, &claim, &seen))?;
        if !holds {
            failed.push(claim.to_string());
        }
        reported.push(json!({
            "claim": claim.to_string(),
            "bound": claim.bound().to_string(),
            "median": seen.median,
            "interval_95": [seen.low, seen.high],
            "holds": holds,
            "tries": tries,
        }));
    }
    output::line(format_args!("{} of {} claims hold", reported.len() - failed.len(), reported.len()))?;
    Ok((reported, verdict(&failed)))
}

fn verdict(failed: &[String]) -> anyhow::Result<()> {
    ensure!(failed.is_empty(), "{} of the claims did not hold, twice: {}", failed.len(), failed.join("; "));
    Ok(())
}

fn line(state: &str, claim: &Claim, seen: &Estimate) -> String {
    let Estimate { median, low, high } = seen;
    format!("{state:<6} {:<56} {median:.3}  ({low:.3} to {high:.3})  {}", claim.to_string(), claim.bound())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_claim_fails_the_command_by_name() {
        assert!(verdict(&[]).is_ok());
        let error = verdict(&["int8g32 8+1 rows".into(), "int4g32 block".into()]).unwrap_err().to_string();
        assert_eq!(error, "2 of the claims did not hold, twice: int8g32 8+1 rows; int4g32 block");
    }
}
