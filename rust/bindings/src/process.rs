//! What holds for this process, and not for a child that is forked from it.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Whether this process is a forked child, with the memory of its parent and none of the parent's threads; or may be one.
static FORKED: AtomicBool = AtomicBool::new(true);

/// The number of CPUs that this process may use; 0 if it is not known yet.
static CPUS: AtomicUsize = AtomicUsize::new(0);

/// Looks where this process comes from, and from now on notices when it is forked. To be called once, before anything here is asked.
pub(crate) fn begin() {
    #[cfg(unix)]
    {
        extern "C" fn in_child() {
            FORKED.store(true, Ordering::Relaxed);
            CPUS.store(0, Ordering::Relaxed);
        }
        // SAFETY: the function only stores to atomics, which may be done in a child of a process with threads.
        let noticed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) } == 0;
        FORKED.store(!noticed || !is_a_program_s_own(), Ordering::Relaxed);
    }
}

/// Whether this process has started a program after it was made, and so has none of its parent's memory.
#[cfg(unix)]
fn is_a_program_s_own() -> bool {
    /// Of the kernel's flags for a process (`PF_FORKNOEXEC`): it was forked and has not started a program.
    const FORKED_ONLY: u32 = 0x40;
    // Only Linux has this file. The flags are the ninth field, and the second, the name in parentheses, may contain anything.
    let flags = std::fs::read_to_string("/proc/self/stat").ok().and_then(|line| {
        let (_, fields) = line.rsplit_once(')')?;
        fields.split_ascii_whitespace().nth(6)?.parse::<u32>().ok()
    });
    // Where flags are not told, they are 0.
    flags.is_some_and(|flags| flags != 0 && flags & FORKED_ONLY == 0)
}

/// Whether this process was forked, or may have been, and has not started a program since.
pub(crate) fn may_be_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// The number of CPUs that this process may use. The system is asked once, as that reads files where groups of processes have limits.
pub(crate) fn cpus() -> NonZero<usize> {
    NonZero::new(CPUS.load(Ordering::Relaxed)).unwrap_or_else(|| {
        let cpus = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
        CPUS.store(cpus.get(), Ordering::Relaxed);
        cpus
    })
}

/// Asks for the number of CPUs again when it is needed.
pub(crate) fn forget_cpus() {
    CPUS.store(0, Ordering::Relaxed);
}
