//! IEEE arithmetic, whatever the thread was set to.
//!
//! `torch.set_flush_denormal(True)` makes the calling thread treat subnormal numbers as zero, and helper threads may or may not have inherited
//! that. Results must depend neither on it nor on a rounding direction, and half precision is widened by way of subnormals. So callers whose
//! threads may have been set otherwise call this crate, and compute what they derive from its results, within [`strict()`].

use std::hint::black_box;
use std::marker::PhantomData;

/// The result of the work, done in IEEE arithmetic whatever this thread is set to. Afterwards the thread is as it was.
///
/// The compiler knows nothing of modes, and may move arithmetic, and calls of functions without effects, past the instructions that set
/// them. It may not move anything past what it cannot look into: what the work starts from is only known once the mode is set, and the mode
/// is restored once the result is known.
#[inline]
pub fn strict<T>(work: impl FnOnce() -> T) -> T {
    let _strict = StrictFloats::enter();
    black_box(apart(black_box(work)))
}

/// Not inlined, so that no constant of the work is computed with outside.
#[inline(never)]
fn apart<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// While this lives, its thread rounds to nearest and keeps subnormal numbers. Dropping it restores the former mode.
pub(crate) struct StrictFloats {
    former: Mode,
    /// The mode is the thread's: the guard must stay on it.
    _not_send: PhantomData<*const ()>,
}

impl StrictFloats {
    pub(crate) fn enter() -> Self {
        let former = mode::get();
        if former & mode::MASK != 0 {
            mode::set(former & !mode::MASK);
        }
        Self { former, _not_send: PhantomData }
    }
}

impl Drop for StrictFloats {
    fn drop(&mut self) {
        if self.former & mode::MASK != 0 {
            mode::set(self.former);
        }
    }
}

use mode::Mode;

#[cfg(target_arch = "x86_64")]
mod mode {
    use std::arch::asm;

    pub(super) type Mode = u32;

    /// Flush to zero, rounding control, denormals are zero.
    pub(super) const MASK: Mode = 0x8000 | 0x6000 | 0x0040;

    pub(super) fn get() -> Mode {
        let mut mode: Mode = 0;
        // SAFETY: stores the 32-bit control register to a local variable of that size.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack, preserves_flags)) };
        mode
    }

    pub(super) fn set(mode: Mode) {
        // SAFETY: loads a value that came from the register, with control bits changed. Rust code between `enter` and `drop` runs in the
        // mode that the language assumes; afterwards the thread is as it was found.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, readonly, preserves_flags)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod mode {
    use std::arch::asm;

    pub(super) type Mode = u64;

    /// Flush to zero, rounding mode, flush to zero for half precision.
    pub(super) const MASK: Mode = (1 << 24) | (0b11 << 22) | (1 << 19);

    pub(super) fn get() -> Mode {
        let mode: Mode;
        // SAFETY: reads the floating-point control register.
        unsafe { asm!("mrs {}, fpcr", out(reg) mode, options(nomem, nostack, preserves_flags)) };
        mode
    }

    pub(super) fn set(mode: Mode) {
        // SAFETY: writes a value that came from the register, with control bits changed.
        unsafe { asm!("msr fpcr, {}", in(reg) mode, options(nomem, nostack, preserves_flags)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod mode {
    pub(super) type Mode = u32;
    pub(super) const MASK: Mode = 0;

    pub(super) fn get() -> Mode {
        0
    }

    pub(super) fn set(_: Mode) {}
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn subnormals_survive_inside_and_the_mode_comes_back() {
        let tiny = std::hint::black_box(f32::MIN_POSITIVE);
        let former = mode::get();
        mode::set(former | 0x8040);
        assert_eq!(std::hint::black_box(tiny) * 0.5, 0.0, "flushing is on");
        {
            let _strict = StrictFloats::enter();
            assert!(std::hint::black_box(tiny) * 0.5 > 0.0);
        }
        assert!(strict(|| std::hint::black_box(tiny) * 0.5).to_bits() > 0);
        assert_eq!(mode::get() & mode::MASK, 0x8040);
        mode::set(former);
    }
}
