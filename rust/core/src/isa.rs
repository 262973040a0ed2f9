//! Which instruction set the kernels run on.
//!
//! Every kernel is plain Rust, written once. [`Isa::run`] is compiled three times, with different target features, and picks a copy at run
//! time. An [`Isa`] is only made by checking the CPU, so it is the proof that its copy may run. The arithmetic of all copies is the same, so
//! the choice changes the speed and no bit of the result.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// The environment variable that forces an instruction set.
pub(crate) const VARIABLE: &str = "NORMCLIP_ISA";

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A computation that is compiled for each instruction set.
pub trait Op {
    /// What it returns.
    type Output;

    /// The computation. Implementations and all that they call must be `#[inline(always)]`: what the compiler leaves outside the function with
    /// the `target_feature` does not use it.
    fn call<S: Simd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// The instructions that every CPU of the architecture has.
    pub const BASELINE: Self = Self(Level::Baseline);

    /// All sets that this CPU has, slowest first.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "one set elsewhere"))]
        let mut found = vec![Self::BASELINE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma") {
                found.push(Self(Level::Avx2));
                if ["avx512f", "avx512bw", "avx512dq", "avx512vl"].into_iter().all(has_avx512_part) {
                    found.push(Self(Level::Avx512));
                }
            }
        }
        found
    }

    /// The set with this name.
    ///
    /// # Errors
    /// [`IsaError`] if this CPU has no set of that name.
    pub fn named(name: &str) -> Result<Self, IsaError> {
        let available = Self::available();
        available
            .iter()
            .copied()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| IsaError { asked: name.to_owned(), available: available.iter().map(|isa| isa.name()).collect() })
    }

    /// The set in use: the one that `NORMCLIP_ISA` names, else the fastest. Decided once per process.
    ///
    /// # Errors
    /// [`IsaError`] if the variable names a set that this CPU lacks.
    pub fn active() -> Result<Self, IsaError> {
        static ACTIVE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        ACTIVE
            .get_or_init(|| match std::env::var(VARIABLE) {
                Ok(name) if !name.is_empty() => Self::named(&name),
                _ => Ok(Self::available().last().copied().unwrap_or(Self::BASELINE)),
            })
            .clone()
    }

    /// `"baseline"`, `"avx2"` or `"avx512"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Runs the copy of `op` that was compiled for this set.
    #[inline]
    pub fn run<O: Op>(self, op: O) -> O::Output {
        match self.0 {
            Level::Baseline => op.call(Portable),
            // SAFETY: `Isa(Avx2)` is only made by `available`, which has checked the CPU for it.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { call_avx2(op) },
            // SAFETY: `Isa(Avx512)` is only made by `available`, which has checked the CPU for it.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { call_avx512(op) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512_part(feature: &str) -> bool {
    match feature {
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        _ => is_x86_feature_detected!("avx512vl"),
    }
}

// The feature `fma` alone fuses no operations: the compiler never does by itself, and kernels ask for it where the product is exact.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,fma")]
fn call_avx2<O: Op>(op: O) -> O::Output {
    // SAFETY: this function is only called where the CPU has its target features.
    op.call(unsafe { Avx2::assume() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn call_avx512<O: Op>(op: O) -> O::Output {
    // SAFETY: this function is only called where the CPU has its target features.
    op.call(unsafe { Avx512::assume() })
}

/// The CPU lacks the instruction set that was asked for.
#[derive(Clone, Debug)]
pub struct IsaError {
    asked: String,
    available: Vec<&'static str>,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VARIABLE}={} is not available on this CPU: unset it or choose one of {}", self.asked, self.available.join(", "))
    }
}

impl std::error::Error for IsaError {}
