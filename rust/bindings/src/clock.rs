//! How many steps a parameter has taken: a number, or a tensor of one number that counts them.

use normclip_core::Dtype;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyInt;

use crate::extract::{Exported, Extractor, Form};
use crate::names::Names;

/// How many steps a parameter has taken.
pub(crate) struct Clock {
    pub(crate) steps: u64,
    /// The tensor that counts them.
    tensor: Option<Py<PyAny>>,
}

/// The memory of such a tensor.
pub(crate) struct Counter {
    exported: Exported,
    is_double: bool,
}

impl Clock {
    /// What an optimizer's member has, which errors call by this index.
    pub(crate) fn of<'py>(names: &Names, extractor: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(number) = object.cast::<PyInt>() {
            return Ok(Self { steps: number.extract()?, tensor: None });
        }
        let value = Counter::of(names, extractor, index, object)?.get();
        if !(value >= 0.0 && value.fract() == 0.0 && value <= u64::MAX as f64) {
            let name = names.of(index);
            return Err(PyValueError::new_err(format!("{name} is {value}: it counts steps, so load the state of an optimizer")));
        }
        Ok(Self { steps: value as u64, tensor: Some(object.clone().unbind()) })
    }

    /// The memory of the tensor, if there is one.
    pub(crate) fn counter<'py>(
        &self,
        py: Python<'py>,
        names: &Names,
        extractor: &mut Extractor<'_, 'py>,
        index: usize,
    ) -> PyResult<Option<Counter>> {
        self.tensor.as_ref().map(|tensor| Counter::of(names, extractor, index, tensor.bind(py))).transpose()
    }

    /// The tensor.
    pub(crate) fn tensor(&self) -> Option<&Py<PyAny>> {
        self.tensor.as_ref()
    }
}

impl Counter {
    fn of<'py>(names: &Names, extractor: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Form::Dense(exported) = extractor.tensor(index, object)? {
            let is_one = exported.tensor.device.is_host() && exported.tensor.shape().iter().all(|size| *size == 1);
            match extractor.dtype(index, object, &exported.tensor)? {
                Dtype::F32 if is_one => return Ok(Self { exported, is_double: false }),
                Dtype::F64 if is_one => return Ok(Self { exported, is_double: true }),
                _ => {}
            }
        }
        Err(PyTypeError::new_err(format!("{} is not one number of float32 or float64 in CPU memory", names.describe(index, object))))
    }

    fn get(&self) -> f64 {
        let start = self.exported.tensor.start();
        // SAFETY: `of` has checked that there is one number of this type in CPU memory. It was borrowed in the same call of `Clock::of`, and no
        // Python code has run since, or the capsule keeps it alive.
        unsafe { if self.is_double { start.cast::<f64>().read_unaligned() } else { f64::from(start.cast::<f32>().read_unaligned()) } }
    }

    /// Sets the number.
    ///
    /// # Safety
    /// No Python code has run since this was made.
    pub(crate) unsafe fn set(&self, steps: u64) {
        let start = self.exported.tensor.start();
        // SAFETY: as in `get`, by the caller's promise.
        unsafe {
            if self.is_double {
                start.cast::<f64>().write_unaligned(steps as f64)
            } else {
                start.cast::<f32>().write_unaligned(steps as f32)
            }
        }
    }
}
