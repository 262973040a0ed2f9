//! The inner product of two lists of tensors.

use normclip_core::{Dtype, Pairs, TensorError, View};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::compute::compute;
use crate::extract::{Exported, Extractor, Form};
use crate::list::listed;
use crate::names::Names;

/// Σxy, √Σx², √Σy² and the cosine of two tensors, or of the tensors of two iterables, in one read of both.
#[pyfunction]
pub(crate) fn dot(xs: &Bound<'_, PyAny>, ys: &Bound<'_, PyAny>) -> PyResult<(f64, f64, f64, f64)> {
    let py = xs.py();
    let dlpack = intern!(py, "__dlpack__");
    let (xs, ys) = (listed(xs, "xs", dlpack)?, listed(ys, "ys", dlpack)?);
    if xs.len() != ys.len() {
        return Err(PyValueError::new_err(format!(
            "xs has {} tensors and ys has {}: pass as many of both, in the same order",
            xs.len(),
            ys.len()
        )));
    }
    let names = [Names::tensors("xs"), Names::tensors("ys")];
    let mut sides = [Extractor::new(py, &names[0], false)?, Extractor::new(py, &names[1], false)?];
    let mut owners = Vec::with_capacity(xs.len());
    for (index, (x, y)) in xs.iter().zip(ys.iter()).enumerate() {
        let objects = [sides[0].resolved(&x)?, sides[1].resolved(&y)?];
        let [x, y] = &mut sides;
        let exported = [export(x, index, &objects[0])?, export(y, index, &objects[1])?];
        owners.push((objects, exported));
    }
    let ran_python = sides.iter().any(Extractor::ran_python);
    let mut pairs = Vec::with_capacity(owners.len());
    for (index, (objects, exported)) in owners.iter_mut().enumerate() {
        for ((side, object), exported) in sides.iter_mut().zip(&*objects).zip(&mut *exported) {
            if ran_python && exported.0.owner.is_none() {
                // Code of others may have freed what was borrowed before it ran.
                *exported = export(side, index, object)?;
            }
        }
        pairs.push(pair(index, objects, exported, &names)?);
    }
    let found = compute(py, |team| {
        let products = normclip_core::dot(&Pairs::new(pairs), team);
        (products.xy.value(), products.xx.norm(), products.yy.norm(), products.cosine())
    });
    // The memory was in use until here.
    drop(owners);
    found
}

fn export<'py>(side: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<(Exported, Dtype)> {
    let Form::Dense(exported) = side.tensor(index, object)? else {
        return Err(PyTypeError::new_err(format!("{} is sparse: pass it dense, with .to_dense()", side.names().describe(index, object))));
    };
    let dtype = side.dtype(index, object, &exported.tensor)?;
    Ok((exported, dtype))
}

fn pair(index: usize, objects: &[Bound<'_, PyAny>; 2], exported: &[(Exported, Dtype); 2], names: &[Names; 2]) -> PyResult<[View; 2]> {
    let [(x, x_dtype), (y, y_dtype)] = exported;
    let (x, y) = (&x.tensor, &y.tensor);
    let both = || format!("{} and {}", names[0].describe(index, &objects[0]), names[1].describe(index, &objects[1]));
    if x.shape() != y.shape() {
        return Err(PyValueError::new_err(format!("{} have different shapes: pass pairs of the same shape", both())));
    }
    if x_dtype.is_complex() != y_dtype.is_complex() {
        return Err(PyTypeError::new_err(format!("{} are complex and real: cast the real one to complex", both())));
    }
    // SAFETY: as for `TensorList`; the owners live until the product is there.
    let (x_view, y_view) = unsafe {
        let y_view = View::in_order_of(x.strides(), y.start(), *y_dtype, y.shape(), y.strides());
        (View::new(x.start(), *x_dtype, x.shape(), x.strides()), y_view)
    };
    let fault = |side: usize| move |problem| names[side].fault(TensorError { index, problem }, &objects[side]);
    Ok([x_view.map_err(fault(0))?, y_view.map_err(fault(1))?])
}
