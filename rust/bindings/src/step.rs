//! `Step`: the parameters of an optimizer with their states and gradients, taken once, then measured and moved one step.

use normclip_core::kernels::Sgd;
use normclip_core::{Dtype, Parameters, TensorError, Tensors, View, norm, update};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::compute::compute;
use crate::extract::{Exported, Extractor};
use crate::names::{Names, Role};
use crate::threads::detached;

/// A parameter: its group and its place there, the tensor, its gradient, its states, and whether these are new.
type Member<'py> = (usize, usize, Bound<'py, PyAny>, Bound<'py, PyAny>, Vec<Bound<'py, PyAny>>, bool);

/// What errors call the states, in their order.
const STATES: [&str; 1] = ["momentum buffer"];

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
    /// The formula of a step. A new buffer, of zeros, takes all of the first direction, however it is dampened.
    fn formula(&self, coefficient: f64, new: bool) -> Sgd {
        let &Self { lr, momentum, dampening, weight_decay, nesterov, maximize } = self;
        let (coefficient, dampening) = (if maximize { -coefficient } else { coefficient }, if new { 0.0 } else { dampening });
        Sgd { coefficient, lr, momentum, dampening, nesterov, weight_decay }
    }
}

/// The tensors of a step. Everything about them is checked when it is made, so that no step fails halfway.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct Step {
    /// The group of each parameter, and whether its states are new.
    places: Vec<(usize, bool)>,
    /// How many states each parameter has.
    states: Vec<usize>,
    /// Each parameter, its states and its gradient.
    objects: Vec<Py<PyAny>>,
    names: Names,
    #[expect(dead_code, reason = "held for their references")]
    owners: Vec<Py<PyAny>>,
    gradients: Tensors,
    parameters: Parameters,
}

#[pymethods]
impl Step {
    #[new]
    fn new(py: Python<'_>, members: Vec<Member<'_>>) -> PyResult<Self> {
        Self::take(py, members, false)
    }

    /// Checks the same of torch tensors on any device.
    #[staticmethod]
    fn check(py: Python<'_>, members: Vec<Member<'_>>) -> PyResult<()> {
        Self::take(py, members, true).map(drop)
    }

    /// The L2 norm of all gradients as one vector.
    fn norm(&self, py: Python<'_>) -> PyResult<f64> {
        compute(py, |team| norm(&self.gradients, 2.0, team))
    }

    /// Takes a step with the gradients times the coefficient, by the settings of each parameter's group. Returns the tensors that were written.
    fn step_<'py>(&self, py: Python<'py>, coefficient: f64, settings: Vec<Settings>) -> PyResult<Bound<'py, PyList>> {
        let formula = |&(group, new): &(usize, bool)| Some(settings.get(group)?.formula(coefficient, new));
        let Some(formulas) = self.places.iter().map(formula).collect::<Option<Vec<_>>>() else {
            return Err(PyValueError::new_err(format!("settings of {} groups, and there are more", settings.len())));
        };
        // SAFETY: that nobody else uses the memory meanwhile is up to the caller in Python, as with every in-place operation of torch.
        compute(py, |team| unsafe { update(&self.parameters, |place| formulas[place], team) })?;
        let mut objects = self.objects.iter();
        let mut written = Vec::with_capacity(self.objects.len());
        for states in &self.states {
            written.extend(objects.by_ref().take(states + 1));
            objects.next(); // the gradient
        }
        PyList::new(py, written)
    }

    /// As `TensorList.check_unchanged`.
    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        let objects: Vec<_> = self.objects.iter().map(|object| object.bind(py).clone()).collect();
        let taken = Taken::of(&self.names, Extractor::new(py, &self.names, true)?, &objects)?;
        let (views, _) = taken.views(&self.states)?;
        match views.iter().zip(self.parameters.views()).position(|(found, expected)| found != expected) {
            Some(index) => Err(self.names.changed(index, &objects[index])),
            None => Ok(()),
        }
    }
}

impl Step {
    fn take(py: Python<'_>, members: Vec<Member<'_>>, anywhere: bool) -> PyResult<Self> {
        let count = members.iter().map(|(_, _, _, _, states, _)| states.len() + 2).sum();
        // In the order of `Parameters`: each parameter, its states and its gradient.
        let (mut objects, mut roles) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let (mut states, mut places) = (Vec::with_capacity(members.len()), Vec::with_capacity(members.len()));
        for (group, place, parameter, gradient, its_states, new) in members {
            states.push(its_states.len());
            places.push((group, new));
            roles.push((group, place, Role::Parameter));
            roles.extend((0..its_states.len()).map(|state| (group, place, Role::State(STATES.get(state).copied().unwrap_or("state")))));
            roles.push((group, place, Role::Gradient));
            objects.push(parameter);
            objects.extend(its_states);
            // A flag of torch's that memory does not show; gradients of complex numbers' parts have it.
            let negative = gradient.call_method0(intern!(py, "is_neg"))?.is_truthy()?;
            objects.push(if negative { gradient.call_method0(intern!(py, "resolve_neg"))? } else { gradient });
        }
        let names = Names::Members(roles);
        let extractor = Extractor::new(py, &names, true)?;
        let taken = Taken::of(&names, if anywhere { extractor.anywhere() } else { extractor }, &objects)?;
        let (views, gradients) = taken.views(&states)?;
        let parameters =
            detached(py, || Parameters::new(views, states.iter().copied()))?.map_err(|error| names.fault(error, &objects[error.index]))?;
        let gradients = detached(py, || Tensors::new(gradients))?;
        let owners = taken.exported.into_iter().filter_map(|(exported, _)| exported.owner).collect();
        let objects = objects.into_iter().map(Bound::unbind).collect();
        Ok(Self { places, states, objects, names, owners, gradients, parameters })
    }
}

/// Tensors as they were exported.
struct Taken<'a, 'py> {
    names: &'a Names,
    objects: &'a [Bound<'py, PyAny>],
    exported: Vec<(Exported, Dtype)>,
}

impl<'a, 'py> Taken<'a, 'py> {
    fn of(names: &'a Names, extractor: Extractor<'a, 'py>, objects: &'a [Bound<'py, PyAny>]) -> PyResult<Self> {
        Ok(Self { names, objects, exported: extractor.dense(objects)? })
    }

    /// The memory of all tensors, in the order of their parameters, and that of the gradients for themselves; for so many states of each.
    fn views(&self, states: &[usize]) -> PyResult<(Vec<View>, Vec<View>)> {
        let (mut views, mut gradients, mut first) = (Vec::with_capacity(self.objects.len()), Vec::with_capacity(states.len()), 0);
        for states in states {
            let gradient = first + states + 1;
            for index in first..=gradient {
                self.check_alike(index, first)?;
                views.push(self.view(index, first)?);
            }
            gradients.push(self.view(gradient, gradient)?);
            first = gradient + 1;
        }
        Ok((views, gradients))
    }

    /// Refuses a tensor that is not of the element type, device and shape of its parameter.
    fn check_alike(&self, index: usize, parameter: usize) -> PyResult<()> {
        let [(tensor, dtype), (first, first_dtype)] =
            [&self.exported[index], &self.exported[parameter]].map(|(one, dtype)| (&one.tensor, dtype));
        let name = |index: usize| self.names.describe(index, &self.objects[index]);
        if dtype != first_dtype || !(tensor.device == first.device || tensor.device.is_host() && first.device.is_host()) {
            return Err(PyTypeError::new_err(format!(
                "{} and {} differ in element type or device: move one to where the other is, with .to()",
                name(index),
                name(parameter)
            )));
        }
        if tensor.shape() != first.shape() {
            return Err(PyValueError::new_err(format!("{} and {} have different shapes: make them alike", name(index), name(parameter))));
        }
        Ok(())
    }

    /// The memory of a tensor, in the order of another.
    fn view(&self, index: usize, leader: usize) -> PyResult<View> {
        let ((one, dtype), (leader, _)) = (&self.exported[index], &self.exported[leader]);
        let (tensor, leader) = (&one.tensor, &leader.tensor);
        // A handle says nothing about what shares memory with what.
        let shape = if tensor.device.has_addresses() { tensor.shape() } else { &[0] };
        // SAFETY: a DLPack tensor describes memory that is valid while its owner lives, and `Step` keeps objects and owners. That nobody else
        // uses it while a step is taken is up to the caller in Python. Memory of other devices is not read or written: `Step::check` looks at
        // its addresses alone.
        let view = unsafe { View::in_order_of(leader.strides(), tensor.start(), *dtype, shape, tensor.strides()) };
        view.map_err(|problem| self.names.fault(TensorError { index, problem }, &self.objects[index]))
    }
}
