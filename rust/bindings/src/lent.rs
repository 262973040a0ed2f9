//! torch's threads: how many there are, and its pool, where that may be used.
//!
//! After each of torch's operations its workers stay awake for some milliseconds. They help sooner than threads that sleep, and any other
//! threads would have to share the cores with them. Since 2.10 torch has functions for this in its stable C interface
//! (`torch/csrc/stable/c/shim.h`). They are looked up in the library that the process has loaded already: nothing is linked or imported.
//!
//! The workers are OpenMP's. In a forked child they are gone, and would be waited for without end. So they are not used in a process that was
//! forked, or may have been.

use std::ffi::{c_int, c_void};
use std::num::NonZero;
use std::sync::OnceLock;

use normclip_core::Lender;
use pyo3::intern;
use pyo3::prelude::*;

use crate::process;
use crate::torch::torch;

/// The threads of the torch that is loaded.
pub(crate) struct Lent {
    /// What `torch.get_num_threads` says.
    pub(crate) threads: NonZero<usize>,
    /// Its pool, if it may be used.
    pub(crate) lender: Option<Lender>,
}

impl Lent {
    /// None if torch is not loaded.
    pub(crate) fn by_torch(py: Python<'_>) -> PyResult<Option<Self>> {
        if let Some(Some(interface)) = INTERFACE.get() {
            return Ok(Some(interface.lent()));
        }
        // Where the module has this function, its libraries are loaded.
        let number = match torch(py)? {
            Some(torch) => torch.getattr_opt(intern!(py, "get_num_threads"))?,
            None => None,
        };
        number
            .map(|number| match INTERFACE.get_or_init(Interface::find) {
                Some(interface) => Ok(interface.lent()),
                None => Ok(Self { threads: number.call0()?.extract()?, lender: None }),
            })
            .transpose()
    }
}

/// Of torch's stable C interface. An error is a result other than 0.
struct Interface {
    /// `torch_parallel_for(begin, end, grain_size, func, ctx)` calls `func(from, to, ctx)` for parts of `begin..end`, each on a thread of its
    /// own, the calling thread among them. Within another parallel region, it makes one call for all.
    parallel_for: unsafe extern "C" fn(i64, i64, i64, Part, *mut c_void) -> c_int,
    /// `torch_get_num_threads(out_num_threads)`
    get_num_threads: unsafe extern "C" fn(*mut u32) -> c_int,
}

type Part = unsafe extern "C" fn(i64, i64, *mut c_void);

/// Of the torch that is loaded; None in it if that has no such interface.
static INTERFACE: OnceLock<Option<Interface>> = OnceLock::new();

impl Interface {
    /// Only on Linux can be told where a process comes from.
    #[cfg(not(target_os = "linux"))]
    fn find() -> Option<Self> {
        None
    }

    #[cfg(target_os = "linux")]
    fn find() -> Option<Self> {
        use std::mem::transmute;
        use std::ptr::NonNull;

        // SAFETY: the name is a C string, and nothing is loaded, so no code runs. The handle is not closed: what comes from it stays valid.
        let library = NonNull::new(unsafe { libc::dlopen(c"libtorch_cpu.so".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) })?;
        // SAFETY: a handle of a library, and a C string.
        let symbol = |name: &std::ffi::CStr| NonNull::new(unsafe { libc::dlsym(library.as_ptr(), name.as_ptr()) });
        let (parallel_for, get_num_threads) = (symbol(c"torch_parallel_for")?, symbol(c"torch_get_num_threads")?);
        // SAFETY: functions of these names have these types in every version of torch that has them: its stable interface.
        Some(unsafe {
            Self {
                parallel_for: transmute::<NonNull<c_void>, unsafe extern "C" fn(i64, i64, i64, Part, *mut c_void) -> c_int>(parallel_for),
                get_num_threads: transmute::<NonNull<c_void>, unsafe extern "C" fn(*mut u32) -> c_int>(get_num_threads),
            }
        })
    }

    fn lent(&self) -> Lent {
        let mut threads = 1;
        // SAFETY: writes to a variable of this type, or not at all if there is an error.
        unsafe { (self.get_num_threads)(&raw mut threads) };
        let threads = usize::try_from(threads).ok().and_then(NonZero::new).unwrap_or(NonZero::<usize>::MIN);
        Lent { threads, lender: (!process::may_be_forked()).then_some(lend) }
    }
}

/// Torch's pool, as the core knows it.
fn lend(threads: NonZero<usize>, work: &(dyn Fn() + Sync)) {
    unsafe extern "C" fn part(_from: i64, _to: i64, work: *mut c_void) {
        // SAFETY: the pointer that is passed below.
        let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
        work();
    }
    let Some(Some(interface)) = INTERFACE.get() else { return };
    let parts = i64::try_from(threads.get()).unwrap_or(i64::MAX);
    // SAFETY: `work` may be called on several threads, and does not unwind. When the function returns, so have all calls. Should it fail, it
    // has made fewer, which a lender may.
    unsafe { (interface.parallel_for)(0, parts, 1, part, (&raw const work).cast_mut().cast()) };
}
