//! The inner product of two lists of tensors.

use normclip_core::{Dtype, Pairs, TensorError, View};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::compute::compute;
use crate::dlpack::Device;
use crate::extract::{Exported, Extractor, Form, place};
use crate::intake::objects_of;
use crate::names::Names;

const NAMES: Names = Names::Pairs;

/// Two tensors, or the tensors of two iterables, of which there have to be as many: the pairs one after the other.
fn listed<'py>(xs: &Bound<'py, PyAny>, ys: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let dlpack = intern!(xs.py(), "__dlpack__");
    let (xs, ys) = (objects_of(xs, "xs", dlpack)?, objects_of(ys, "ys", dlpack)?);
    if xs.len() != ys.len() {
        return Err(PyValueError::new_err(format!(
            "xs has {} tensors and ys has {}: pass as many of both, in the same order",
            xs.len(),
            ys.len()
        )));
    }
    Ok(xs.iter().zip(ys.iter()).flat_map(<[_; 2]>::from).collect())
}

/// Two tensors that are to be multiplied.
struct Pair<'a, 'py> {
    /// The index of the first.
    index: usize,
    objects: &'a [Bound<'py, PyAny>; 2],
}

impl Pair<'_, '_> {
    /// Both tensors, as errors call them.
    fn describe(&self) -> String {
        let [x, y] = [0, 1].map(|side| NAMES.describe(self.index + side, &self.objects[side]));
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
        let fault = |side: usize| move |problem| NAMES.fault(TensorError { index: self.index + side, problem }, &self.objects[side]);
        Ok([x_view.map_err(fault(0))?, y_view.map_err(fault(1))?])
    }
}

/// The pairs of such a list.
fn pairs<'a, 'py>(objects: &'a [Bound<'py, PyAny>]) -> impl Iterator<Item = Pair<'a, 'py>> {
    objects.as_chunks().0.iter().enumerate().map(|(pair, objects)| Pair { index: 2 * pair, objects })
}

/// Σxy, √Σx², √Σy² and the cosine of two tensors, or of the tensors of two iterables, in one read of both.
#[pyfunction]
pub(crate) fn dot(xs: &Bound<'_, PyAny>, ys: &Bound<'_, PyAny>) -> PyResult<(f64, f64, f64, f64)> {
    let py = xs.py();
    let mut extractor = Extractor::new(py, &NAMES, false)?;
    let objects = listed(xs, ys)?.iter().map(|object| extractor.resolved(object)).collect::<PyResult<Vec<_>>>()?;
    let exports = extractor.dense(&objects)?;
    let views = pairs(&objects).zip(exports.as_chunks().0).map(|(pair, exports)| pair.views(exports)).collect::<PyResult<_>>()?;
    let found = compute(py, |team| {
        let products = normclip_core::dot(&Pairs::new(views), team);
        (products.xy.value(), products.xx.norm(), products.yy.norm(), products.cosine())
    });
    // The memory was in use until here.
    drop((objects, exports));
    found
}

/// Refuses lists of tensors on any devices that have no inner product: by the rules of `dot`, and tensors of a pair on different devices.
#[pyfunction]
pub(crate) fn check_pairs(xs: &Bound<'_, PyAny>, ys: &Bound<'_, PyAny>) -> PyResult<()> {
    let mut extractor = Extractor::new(xs.py(), &NAMES, false)?.anywhere();
    for pair in pairs(&listed(xs, ys)?) {
        let [x, y] = pair.objects;
        let (x_shape, x_dtype, x_place) = traits(&mut extractor, pair.index, x)?;
        let (y_shape, y_dtype, y_place) = traits(&mut extractor, pair.index + 1, y)?;
        pair.check([&x_shape, &y_shape], [x_dtype, y_dtype])?;
        if x_place != y_place {
            return Err(PyValueError::new_err(format!("{} are on {x_place} and {y_place}: move one to the other", pair.describe())));
        }
    }
    Ok(())
}

/// The shape, the element type and the device of a tensor.
fn traits<'py>(extractor: &mut Extractor<'_, 'py>, index: usize, object: &Bound<'py, PyAny>) -> PyResult<(Vec<i64>, Dtype, String)> {
    match extractor.tensor(index, object)? {
        Form::Dense(Exported { tensor, owner: _owner }) => {
            let shape = tensor.shape().to_vec();
            let place = if tensor.device.is_host() { "cpu".to_owned() } else { place(object, tensor.device) };
            Ok((shape, extractor.dtype(index, object, &tensor)?, place))
        }
        Form::Abstract(dtype, id) => {
            let shape = object.getattr(intern!(object.py(), "shape"))?.try_iter()?.map(|size| size?.extract()).collect::<PyResult<_>>()?;
            Ok((shape, dtype, place(object, Device { kind: Device::ABSTRACT, id })))
        }
        Form::Sparse => Err(PyTypeError::new_err(format!("{} is sparse: make it dense, with .to_dense()", NAMES.describe(index, object)))),
    }
}
