//! Instruction sets, and the one place that enters code compiled for them.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use super::lanes::Lanes;
use super::pairs::{Pairs, Widened};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
    pairs::selftest,
};

/// Instruction sets that the CPU backend has code for; all give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isa {
    /// As [`Isa::Avx512Vnni`], with AVX-512 BF16: 32 bf16 products an instruction. Only where that gives the bits of docs/numerics.md.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL with VNNI: 16 f32 or 64 int8 products an instruction. AVX-512 without VNNI runs as AVX2.
    Avx512Vnni,
    /// AVX2 with FMA, F16C and AVX-VNNI: 32 int8 products an instruction.
    AvxVnni,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Plain Rust, on any machine.
    Scalar,
}

/// The text names no instruction set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of avx512-bf16, avx512, avx-vnni, avx2, scalar")]
pub struct UnknownIsa(String);

impl std::str::FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == text).ok_or_else(|| UnknownIsa(text.to_owned()))
    }
}

impl Isa {
    /// Best first.
    pub const ALL: [Self; 5] = [Self::Avx512Bf16, Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::Scalar];

    /// As settings spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512Vnni => "avx512",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::Scalar => "scalar",
        }
    }

    /// The best that this machine runs.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Self::Scalar)
    }

    /// Whether this machine runs it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512Vnni.available() && is_x86_feature_detected!("avx512bf16") && bf16_instruction_is_right(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Bf16 | Self::Avx512Vnni | Self::AvxVnni | Self::Avx2 => false,
            Self::Scalar => true,
        }
    }
}

/// Code written once over [`Lanes`]. `run` and all that it calls with `S` must be `#[inline(always)]` and free of
/// closures around vector code: only then is it compiled with the instruction set's features.
pub(super) trait Kernel {
    type Output;
    fn run<S: Lanes>(self, s: S) -> Self::Output;
}

/// Whether the processor's bf16 dot product has the bits that are promised; asked once, and told of if not. The processor has the
/// instruction.
#[cfg(target_arch = "x86_64")]
fn bf16_instruction_is_right() -> bool {
    static RIGHT: OnceLock<bool> = OnceLock::new();
    *RIGHT.get_or_init(|| {
        // SAFETY: who asks has found AVX-512 BF16 and all that `Avx512Vnni` needs.
        let differ = unsafe { enter_avx512_bf16(selftest::Differing) };
        if differ > 0 {
            tracing::warn!(differ, "this processor's bf16 dot product gives other bits than docs/numerics.md promises: it is not used");
        }
        differ == 0
    })
}

/// As [`Kernel`], for code over [`Pairs`].
pub(super) trait PairKernel {
    type Output;
    fn run<P: Pairs>(self, p: P) -> Self::Output;
}

/// Code over pairs on an instruction set that has none.
struct OnLanes<K>(K);

impl<K: PairKernel> Kernel for OnLanes<K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> K::Output {
        self.0.run(Widened(s))
    }
}

/// An instruction set that this machine is known to run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Proven(Isa);

impl Proven {
    /// Panics if the machine lacks it.
    pub(super) fn new(isa: Isa) -> Self {
        assert!(isa.available(), "this machine does not run {isa:?}");
        Self(isa)
    }

    pub(super) fn isa(self) -> Isa {
        self.0
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: a Proven exists only if `available` found every feature that `enter_avx512` enables.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512Vnni => unsafe { kernel.enter_avx512() },
            // SAFETY: as above, for `enter_avx_vnni`.
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => unsafe { kernel.enter_avx_vnni() },
            // SAFETY: as above, for `enter_avx2`.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { kernel.enter_avx2() },
            _ => kernel.run(super::scalar::Scalar),
        }
    }

    /// As [`Proven::run`]; AVX-VNNI has nothing for floats, so there is no code of its own for it.
    #[inline]
    pub(super) fn run_pairs<K: PairKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: a Proven exists only if `available` found every feature that `enter_avx512_bf16` enables.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => unsafe { enter_avx512_bf16(kernel) },
            // SAFETY: as above, for `enter_avx2`, without which AVX-VNNI is not available.
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => unsafe { OnLanes(kernel).enter_avx2() },
            _ => self.run(OnLanes(kernel)),
        }
    }
}

/// Enters a kernel's code for one instruction set. Methods of a trait, for the compiler places their code with the kernel's own module and so compiles
/// modules beside each other; functions would all be placed here, in one unit that takes longer than all others together.
#[cfg(target_arch = "x86_64")]
trait Enter: Kernel + Sized {
    /// # Safety
    /// The processor has AVX2, FMA, F16C and AVX-512 F, BW, DQ, VL and VNNI.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn enter_avx512(self) -> Self::Output {
        // SAFETY: this function's own features are what the token stands for.
        self.run(unsafe { Avx512::new() })
    }

    /// # Safety
    /// The processor has AVX2, FMA, F16C and AVX-VNNI.
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn enter_avx_vnni(self) -> Self::Output {
        // SAFETY: this function's own features are what the token stands for.
        self.run(unsafe { Avx2::<true>::new() })
    }

    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn enter_avx2(self) -> Self::Output {
        // SAFETY: this function's own features are what the token stands for.
        self.run(unsafe { Avx2::<false>::new() })
    }
}

#[cfg(target_arch = "x86_64")]
impl<K: Kernel> Enter for K {}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn enter_avx512_bf16<K: PairKernel>(kernel: K) -> K::Output {
    // SAFETY: this function's own features are what the token stands for.
    kernel.run(unsafe { Avx512Bf16::new() })
}
