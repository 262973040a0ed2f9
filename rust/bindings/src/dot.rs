//! The inner product of two lists of tensors.

use normclip_core::{Dtype, Pairs, TensorError, View};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::compute::compute;
use crate::dlpack::Device;
use crate::extract::{Exported, Extractor, Form, place};
use crate::intake::objects_of;
use crate::names::Names;

/// What errors call the tensors of the two lists.
fn names() -> [Names; 2] {
    [Names::tensors("xs"), Names::tensors("ys")]
}

/// Two tensors, or the tensors of two iterables, of which there have to be as many.
fn lists<'py>(xs: &Bound<'py, PyAny>, ys: &Bound<'py, PyAny>) -> PyResult<[Bound<'py, PyList>; 2]> {
    let dlpack = intern!(xs.py(), "__dlpack__");
    let (xs, ys) = (objects_of(xs, "xs", dlpack)?, objects_of(ys, "ys", dlpack)?);
    if xs.len() != ys.len() {
        return Err(PyValueError::new_err(format!(
            "xs has {} tensors and ys has {}: pass as many of both, in the same order",
            xs.len(),
            ys.len()
        )));
    }
    Ok([xs, ys])
}

/// Two tensors that are to be multiplied.
struct Pair<'a, 'py> {
    index: usize,
    names: &'a [Names; 2],
    objects: [&'a Bound<'py, PyAny>; 2],
}

impl Pair<'_, '_> {
    /// Both tensors, as errors call them.
    fn describe(&self) -> String {
        let [x, y] = [0, 1].map(|side: usize| self.names[side].describe(self.index, self.objects[side]));
        format!("{x} and {y}")
    }

    /// Refuses tensors whose elements do not go together.
    fn check(&self, shapes: [&[i64]; 2], dtypes: [Dtype; 2]) -> PyResult<()> {
        if shapes[0] != shapes[1] {
            return Err(PyValueError::new_err(format!("{} have different shapes: pass pairs of the same shape", self.describe())));
        }
        if dtypes[0].is_complex() != dtypes[1].is_complex() {
            return Err(PyTypeError::new_err(format!("{} are complex and real: cast the real one to complex", self.describe())));
        }
        Ok(())
    }

    /// The memory of both, so that their elements are met in the same order.
    fn views(&self, exports: &[(Exported, Dtype); 2]) -> PyResult<[View; 2]> {
        let [(x, x_dtype), (y, y_dtype)] = exports;
        let (x, y) = (&x.tensor, &y.tensor);
        self.check([x.shape(), y.shape()], [*x_dtype, *y_dtype])?;
        // SAFETY: `dot` keeps the owners until it returns, and has borrowed what has none after the last Python code ran. That no other
        // thread writes or frees the memory meanwhile is up to the caller in Python.
        let [x_view, y_view] = unsafe {
            [
                View::new(x.start(), *x_dtype, x.shape(), x.strides()),
                View::in_order_of(x.strides(), y.start(), *y_dtype, y.shape(), y.strides()),
            ]
        };
        let fault = |side: usize| move |problem| self.names[side].fault(TensorError { index: self.index, problem }, self.objects[side]);
        Ok([x_view.map_err(fault(0))?, y_view.map_err(fault(1))?])
    }
}

/// Σxy, √Σx², √Σy² and the cosine of two tensors, or of the tensors of two iterables, in one read of both.
#[pyfunction]
pub(crate) fn dot(xs: &Bound<'_, PyAny>, ys: &Bound<'_, PyAny>) -> PyResult<(f64, f64, f64, f64)> {
    let (py, names) = (xs.py(), names());
    let [xs, ys] = lists(xs, ys)?;
    let mut sides = [Extractor::new(py, &names[0], false)?, Extractor::new(py, &names[1], false)?];
    let mut objects = Vec::with_capacity(xs.len());
    for (x, y) in xs.iter().zip(ys.iter()) {
        objects.push([sides[0].resolved(&x)?, sides[1].resolved(&y)?]);
    }
    let mut exports = Vec::with_capacity(objects.len());
    for (index, [x, y]) in objects.iter().enumerate() {
        exports.push([export(&mut sides[0], index, x)?, export(&mut sides[1], index, y)?]);
    }
    let ran_python = sides.iter().any(Extractor::ran_python);
    let mut pairs = Vec::with_capacity(objects.len());
    for (index, ([x, y], exports)) in objects.iter().zip(&mut exports).enumerate() {
        for ((side, object), exported) in sides.iter_mut().zip([x, y]).zip(&mut *exports) {
            if ran_python && exported.0.owner.is_none() {
                // What was borrowed before the last Python code ran may have been freed by it. Borrowing again runs none.
                *exported = export(side, index, object)?;
            }
        }
        pairs.push(Pair { index, names: &names, objects: [x, y] }.views(exports)?);
    }
    let found = compute(py, |team| {
        let products = normclip_core::dot(&Pairs::new(pairs), team);
        (products.xy.value(), products.xx.norm(), products.yy.norm(), products.cosine())
    });
    // The memory was in use until here.
    drop((objects, exports));
    found
}

/// The tensor that an object exports, and its element type.
fn export<'py>(side: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<(Exported, Dtype)> {
    let Form::Dense(exported) = side.tensor(index, object)? else { return Err(sparse(side, index, object)) };
    let dtype = side.dtype(index, object, &exported.tensor)?;
    Ok((exported, dtype))
}

fn sparse(side: &Extractor<'_, '_>, index: usize, object: &Bound<'_, PyAny>) -> PyErr {
    PyTypeError::new_err(format!("{} is sparse: pass it dense, with .to_dense()", side.names().describe(index, object)))
}

/// Refuses lists of tensors on any devices that have no inner product: by the rules of `dot`, and tensors of a pair on different devices.
#[pyfunction]
pub(crate) fn check_pairs(xs: &Bound<'_, PyAny>, ys: &Bound<'_, PyAny>) -> PyResult<()> {
    let (py, names) = (xs.py(), names());
    let [xs, ys] = lists(xs, ys)?;
    let mut sides = [Extractor::new(py, &names[0], false)?.anywhere(), Extractor::new(py, &names[1], false)?.anywhere()];
    for (index, (x, y)) in xs.iter().zip(ys.iter()).enumerate() {
        let pair = Pair { index, names: &names, objects: [&x, &y] };
        let [(x_shape, x_dtype, x_place), (y_shape, y_dtype, y_place)] =
            [traits(&mut sides[0], index, &x)?, traits(&mut sides[1], index, &y)?];
        pair.check([&x_shape, &y_shape], [x_dtype, y_dtype])?;
        if x_place != y_place {
            return Err(PyValueError::new_err(format!("{} are on {x_place} and {y_place}: move one to the other", pair.describe())));
        }
    }
    Ok(())
}

/// The shape, the element type and the device of a tensor.
fn traits<'py>(side: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<(Vec<i64>, Dtype, String)> {
    match side.tensor(index, object)? {
        Form::Dense(Exported { tensor, owner: _owner }) => {
            let shape = tensor.shape().to_vec();
            let place = if tensor.device.is_host() { "cpu".to_owned() } else { place(object, tensor.device) };
            Ok((shape, side.dtype(index, object, &tensor)?, place))
        }
        Form::Abstract(dtype, id) => {
            let shape = object.getattr(intern!(object.py(), "shape"))?.try_iter()?.map(|size| size?.extract()).collect::<PyResult<_>>()?;
            Ok((shape, dtype, place(object, Device { kind: Device::ABSTRACT, id })))
        }
        Form::Sparse => Err(sparse(side, index, object)),
    }
}
