//! `Moments`: the numbers that the figures of a vector follow from, as Python has them.

use normclip_core::{Merge, Moments as Totals, merged, strict};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;

/// What the statistics of a vector are derived from: counts, sums and the largest absolute value. Immutable.
///
/// Moments of parts add up to those of the whole: ``Moments.of(a) + Moments.of(b)`` describes a and b together, to the last bit, so that
/// parts can be measured on other processes, sent as arrays of 13 numbers, and merged. ``Moments()`` is that of no elements.
///
/// Example:
///     >>> import numpy as np
///     >>> parts = [Moments.of(np.array([3.0, 0.0])), Moments.of(np.array([-4.0]))]
///     >>> whole = sum(parts, Moments())
///     >>> whole.l2, whole.l1, whole.linf, whole.count, whole.zeros
///     (5.0, 7.0, 4.0, 3, 1)
#[pyclass(frozen, eq, module = "normclip")]
pub(crate) struct Moments(pub(crate) Totals);

impl PartialEq for Moments {
    fn eq(&self, other: &Self) -> bool {
        strict(|| self.0 == other.0)
    }
}

impl Moments {
    /// What follows from the totals.
    fn derived<T>(&self, from: impl FnOnce(&Totals) -> T) -> T {
        strict(|| from(&self.0))
    }
}

#[pymethods]
impl Moments {
    #[new]
    fn new() -> Self {
        Self(Totals::EMPTY)
    }

    /// What :meth:`to_array` has made.
    ///
    /// Args:
    ///     array: 13 numbers.
    ///
    /// Raises:
    ///     ValueError: There are more or fewer, or no elements have such moments; the message says why.
    #[staticmethod]
    fn from_array(array: Vec<f64>) -> PyResult<Self> {
        let numbers: [f64; Totals::LEN] = array
            .try_into()
            .map_err(|array: Vec<f64>| PyValueError::new_err(format!("Moments are {} numbers, not {}", Totals::LEN, array.len())))?;
        let moments = strict(|| Totals::check(&numbers).map(|()| Totals::from_array(numbers)));
        let refusal =
            |rule| PyValueError::new_err(format!("the numbers {numbers:?} are no moments: {rule}; pass what to_array() has made"));
        moments.map(Self).map_err(refusal)
    }

    /// A float64 array of 13 numbers: count, zeros, NaN, infinities; Σ|x| as the unevaluated sum of two numbers, times 2^-64 where max|x| is
    /// 2^960 or more; Σx² as three such pairs, of blocks of tiny elements (times 2^1076), of ordinary ones and of blocks with huge ones (times
    /// 2^-1076); max|x|. Counts are exact to 2^53.
    fn to_array<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "array"), (self.derived(Totals::to_array).to_vec(),))
    }

    /// Number of elements.
    #[getter]
    fn count(&self) -> u64 {
        self.0.count
    }

    /// Elements equal to 0.
    #[getter]
    fn zeros(&self) -> u64 {
        self.0.zeros
    }

    /// Elements that are NaN.
    #[getter]
    fn nans(&self) -> u64 {
        self.0.nans
    }

    /// Elements that are inf or -inf.
    #[getter]
    fn infs(&self) -> u64 {
        self.0.infs
    }

    /// The norm Σ|x|.
    #[getter]
    fn l1(&self) -> f64 {
        self.derived(Totals::l1)
    }

    /// The norm √Σx².
    #[getter]
    fn l2(&self) -> f64 {
        self.derived(Totals::l2)
    }

    /// The norm max|x|.
    #[getter]
    fn linf(&self) -> f64 {
        self.derived(Totals::linf)
    }

    /// √(Σx² / count), NaN for no elements.
    #[getter]
    fn rms(&self) -> f64 {
        self.derived(|totals| totals.roots().rms())
    }

    /// Σ|x| / count, NaN for no elements.
    #[getter]
    fn mean_abs(&self) -> f64 {
        self.derived(Totals::mean_abs)
    }

    /// The cosine of x and sign(x), Σ|x| / (√(count - zeros) √Σx²); NaN for a zero or non-finite vector.
    #[getter]
    fn sign_cosine(&self) -> f64 {
        self.derived(|totals| totals.roots().sign_cosine())
    }

    /// The gradient density (Σ|x|)² / (count Σx²) of Bernstein et al. 2018; NaN for a zero or non-finite vector.
    #[getter]
    fn density(&self) -> f64 {
        self.derived(|totals| totals.roots().density())
    }

    fn __add__(&self, other: &Self) -> Self {
        Self(strict(|| merged([self.0, other.0])))
    }

    fn __hash__(&self) -> u64 {
        self.derived(Totals::to_array).iter().fold(0, |hash: u64, number| hash.rotate_left(5) ^ number.to_bits())
    }

    fn __repr__(&self) -> String {
        let Totals { count, zeros, nans, infs, .. } = self.0;
        format!(
            "Moments(count={count}, zeros={zeros}, nans={nans}, infs={infs}, l1={:?}, l2={:?}, linf={:?})",
            self.l1(),
            self.l2(),
            self.linf()
        )
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Vec<f64>,))> {
        Ok((slf.get_type().getattr("from_array")?, (slf.get().derived(Totals::to_array).to_vec(),)))
    }
}
