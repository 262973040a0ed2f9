//! `normclip._core`: extract, detach, call, map the error.
//!
//! ```text
//! list · dot · step · moments   the operations, and what they give
//! compute    the door to the core, in IEEE arithmetic
//! device     what the kernels of other devices need to know
//! extract    a Python object → View, by DLPack
//! dlpack     the C structs            names     how a tensor is called in an error
//! threads    how many, which instruction set
//! ```

mod compute;
mod device;
mod dlpack;
mod dot;
mod extract;
mod list;
mod moments;
mod names;
mod step;
mod threads;

use pyo3::prelude::*;

/// The Rust side of normclip. Private: import from `normclip`.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::compute::{hard_coefficient, strictly};
    #[pymodule_export]
    use super::device::{DeviceList, collect, collect_grads};
    #[pymodule_export]
    use super::dot::dot;
    #[pymodule_export]
    use super::extract::NotOnCPU;
    #[pymodule_export]
    use super::list::TensorList;
    #[pymodule_export]
    use super::moments::Moments;
    #[pymodule_export]
    use super::step::Step;
    #[pymodule_export]
    use super::threads::{get_num_threads, isa, set_num_threads};

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // A wrong NORMCLIP_ISA or NORMCLIP_NUM_THREADS is an error now, not in the middle of a training run.
        super::threads::team(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
