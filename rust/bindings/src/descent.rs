//! `Descent`: parameters with their gradients and momentum buffers, taken once, then measured and moved one step.

use std::array;

use normclip_core::kernels::Descend;
use normclip_core::{TensorError, Tensors, Updates, View, norm, update};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::compute::compute;
use crate::extract::{Exported, Extractor, Form};
use crate::names::Names;
use crate::threads::detached;

/// A parameter: its group and its place there, the tensor, its gradient, its momentum buffer, if there is one, and whether that is new.
type Member<'py> = (usize, usize, Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, bool);

/// The settings of a group, `Settings` in Python.
#[derive(FromPyObject)]
struct Settings {
    lr: f64,
    momentum: f64,
    dampening: f64,
    weight_decay: f64,
    nesterov: bool,
    maximize: bool,
}

impl Settings {
    /// The numbers of a step. A new buffer, of zeros, takes all of the first direction, however it is dampened.
    fn numbers(&self, coefficient: f64, new: bool) -> Descend {
        let &Self { lr, momentum, dampening, weight_decay, nesterov, maximize } = self;
        let (coefficient, dampening) = (if maximize { -coefficient } else { coefficient }, if new { 0.0 } else { dampening });
        Descend { coefficient, lr, momentum, dampening, nesterov, weight_decay }
    }
}

/// The memory of all of them. Everything about them is checked when it is made, so that no step fails halfway.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct Descent {
    /// The group of each parameter, and whether its buffer is new.
    places: Vec<(usize, bool)>,
    /// Parameters and buffers.
    written: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for their references")]
    read: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for their references")]
    owners: Vec<Py<PyAny>>,
    gradients: Tensors,
    updates: Updates,
}

#[pymethods]
impl Descent {
    #[new]
    fn new(py: Python<'_>, members: Vec<Member<'_>>) -> PyResult<Self> {
        Self::take(py, &members, false)
    }

    /// Checks the same of torch tensors on any device.
    #[staticmethod]
    fn check(py: Python<'_>, members: Vec<Member<'_>>) -> PyResult<()> {
        Self::take(py, &members, true).map(drop)
    }

    /// The L2 norm of all gradients as one vector.
    fn norm(&self, py: Python<'_>) -> PyResult<f64> {
        compute(py, |team| norm(&self.gradients, 2.0, team))
    }

    /// Takes a step with the gradients times the coefficient, by the settings of each parameter's group. Returns the tensors that were written.
    fn step_<'py>(&self, py: Python<'py>, coefficient: f64, settings: Vec<Settings>) -> PyResult<Bound<'py, PyList>> {
        let numbers = |&(group, new): &(usize, bool)| Some(settings.get(group)?.numbers(coefficient, new));
        let Some(numbers) = self.places.iter().map(numbers).collect::<Option<Vec<_>>>() else {
            return Err(PyValueError::new_err(format!("settings of {} groups, and there are more", settings.len())));
        };
        // SAFETY: that nobody else uses the memory meanwhile is up to the caller in Python, as with every in-place operation of torch.
        compute(py, |team| unsafe { update(&self.updates, |member| numbers[member], team) })?;
        PyList::new(py, &self.written)
    }
}

impl Descent {
    fn take(py: Python<'_>, members: &[Member<'_>], anywhere: bool) -> PyResult<Self> {
        let names = Names::Members(members.iter().map(|(group, place, ..)| (*group, *place)).collect());
        let extractor = Extractor::new(py, &names, true)?;
        let mut extractor = if anywhere { extractor.anywhere() } else { extractor };
        let (mut gradients, mut triples) = (Vec::with_capacity(members.len()), Vec::with_capacity(members.len()));
        let (mut written, mut read, mut owners) = (Vec::with_capacity(2 * members.len()), Vec::with_capacity(members.len()), Vec::new());
        for (index, (_, _, parameter, gradient, buffer, _)) in (0..).step_by(3).zip(members) {
            // A flag of torch's that memory does not show; gradients of complex numbers' parts have it.
            let negative = gradient.call_method0(intern!(py, "is_neg"))?.is_truthy()?;
            let gradient = if negative { &gradient.call_method0(intern!(py, "resolve_neg"))? } else { gradient };
            let (x, v, g) = ((index, parameter), buffer.as_ref().map(|buffer| (index + 1, buffer)), (index + 2, gradient));
            gradients.push(extractor.extract(index + 2, gradient)?.read);
            triples.push(match v {
                Some(v) => together(&mut extractor, [x, v, g], &mut owners)?,
                None => {
                    let [x, g] = together(&mut extractor, [x, g], &mut owners)?;
                    let none = View::none(x.dtype());
                    [x, none, g]
                }
            });
            written.extend([parameter].into_iter().chain(buffer).map(|tensor| tensor.clone().unbind()));
            read.push(gradient.clone().unbind());
        }
        let fault = |error: TensorError| {
            let (_, _, parameter, gradient, buffer, _) = &members[error.index / 3];
            names.fault(error, [parameter, buffer.as_ref().unwrap_or(parameter), gradient][error.index % 3])
        };
        let updates = detached(py, || Updates::new(triples))?.map_err(fault)?;
        let gradients = detached(py, || Tensors::new(gradients))?;
        let places = members.iter().map(|(group, .., new)| (*group, *new)).collect();
        Ok(Self { places, written, read, owners, gradients, updates })
    }
}

/// Tensors of a parameter, by their indices, described together. The first says what the others have to be.
fn together<'py, const K: usize>(
    extractor: &mut Extractor<'_, 'py>,
    objects: [(usize, &Bound<'py, PyAny>); K],
    owners: &mut Vec<Py<PyAny>>,
) -> PyResult<[View; K]> {
    let names = extractor.names();
    let mut tensors = Vec::with_capacity(K);
    for (index, object) in objects {
        let Exported { tensor, owner } = match extractor.tensor(index, object)? {
            Form::Dense(exported) => exported,
            Form::Sparse => {
                let name = names.describe(index, object);
                return Err(PyTypeError::new_err(format!("{name} is sparse: make it dense, with .to_dense()")));
            }
            Form::Abstract(..) => {
                let name = names.describe(index, object);
                return Err(PyTypeError::new_err(format!("{name} has no memory of its own: materialize it first")));
            }
        };
        owners.extend(owner);
        tensors.push((extractor.dtype(index, object, &tensor)?, tensor));
    }
    let (dtype, first) = &tensors[0];
    for ((index, object), (other_dtype, other)) in objects.iter().zip(&tensors) {
        let both = || format!("{} and {}", names.describe(*index, object), names.describe(objects[0].0, objects[0].1));
        let (device, other_device) = (first.device, other.device);
        if other_dtype != dtype || !(other_device == device || other_device.is_host() && device.is_host()) {
            return Err(PyTypeError::new_err(format!(
                "{} differ in element type or device: move one to where the other is, with .to()",
                both()
            )));
        }
        if other.shape() != first.shape() {
            return Err(PyValueError::new_err(format!("{} have different shapes: make them alike", both())));
        }
    }
    let (data, strides) = (array::from_fn(|k| tensors[k].1.start()), array::from_fn(|k| tensors[k].1.strides()));
    // A handle says nothing about what shares memory with what.
    let shape = if first.device.has_addresses() { first.shape() } else { &[0] };
    // SAFETY: as for `TensorList`; `Descent` keeps objects and owners. Memory of other devices is looked at by `check` alone, by its addresses.
    let views = unsafe { View::together(data, [*dtype; K], shape, strides) };
    views.map_err(|(k, problem)| names.fault(TensorError { index: objects[k].0, problem }, objects[k].1))
}
