//! The figures that follow from moments: their names, their formulas, and tables of them.
//!
//! A new figure is a line of [`FIGURES`], the getter of `Moments`, and an attribute of `Stats` and `PerTensor` in Python, where it is
//! explained. Whatever else lists figures asks for [`FIGURES`], in Python too.

use normclip_core::{Largest, Merge, Moments, Repetition, Roots, Squares};

/// How a figure follows from moments and their roots.
type Formula = fn(&Roots) -> f64;

/// The name and the formula of each figure, in the order of the columns of a [`Table`].
pub(crate) const FIGURES: &[(&str, Formula)] = &[
    ("count", |roots| roots.moments().count as f64),
    ("zeros", |roots| roots.moments().zeros as f64),
    ("nans", |roots| roots.moments().nans as f64),
    ("infs", |roots| roots.moments().infs as f64),
    ("l1", |roots| roots.moments().l1()),
    ("l2", Roots::l2),
    ("linf", |roots| roots.moments().linf()),
    ("rms", Roots::rms),
    ("mean_abs", |roots| roots.moments().mean_abs()),
    ("sign_cosine", Roots::sign_cosine),
    ("density", Roots::density),
];

/// The orders of the norms that follow from moments, and the names of these figures.
pub(crate) const NORMS: [(f64, &str); 3] = [(1.0, "l1"), (2.0, "l2"), (f64::INFINITY, "linf")];

/// The scales at which backends in Python sum, to give moments as the kernels here do.
pub(crate) const SCALES: [(&str, f64); 5] = [
    ("huge", Largest::HUGE),
    ("unit", Largest::UNIT),
    ("up", Squares::UP),
    ("safe_low", *Squares::SAFE.start()),
    ("safe_high", *Squares::SAFE.end()),
];

/// The bytes of a row of a table: a float64 for each figure.
const ROW: usize = FIGURES.len() * size_of::<f64>();

/// The statistics of a list of tensors, whose moments are added one after the other: moments of all and of each group, and a row of figures
/// for each tensor.
pub(crate) struct Table<'a> {
    all: Moments,
    grouped: Vec<Moments>,
    groups: &'a [usize],
    /// A row for each tensor, or none at all.
    rows: &'a mut [[u8; ROW]],
}

impl<'a> Table<'a> {
    /// The bytes that the rows of so many tensors need.
    pub(crate) fn size(tensors: usize) -> usize {
        tensors * ROW
    }

    /// The table of tensors without elements, to be filled; without bytes, only their moments. There is a group number for each tensor, or
    /// none at all.
    pub(crate) fn new(bytes: &'a mut [u8], groups: &'a [usize]) -> Self {
        let rows = bytes.as_chunks_mut().0;
        rows.fill(row(&Moments::EMPTY));
        Self { all: Moments::EMPTY, grouped: vec![Moments::EMPTY; groups.iter().max().map_or(0, |last| last + 1)], groups, rows }
    }

    /// Adds the moments of the tensor at this index. To be called once for each tensor, in their order.
    pub(crate) fn add(&mut self, index: usize, moments: &Moments) {
        self.all.merge(moments);
        if let Some(group) = self.groups.get(index) {
            self.grouped[*group].merge(moments);
        }
        if let Some(place) = self.rows.get_mut(index) {
            *place = row(moments);
        }
    }

    /// The moments of all tensors and of each group. A repetition adds nothing to these, and its row is that of the tensor it repeats.
    pub(crate) fn finish(self, repetitions: &[Repetition]) -> (Moments, Vec<Moments>) {
        if !self.rows.is_empty() {
            repetitions.iter().for_each(|&(index, first)| self.rows[index] = self.rows[first]);
        }
        (self.all, self.grouped)
    }
}

/// The figures of these moments, as a row of a table.
fn row(moments: &Moments) -> [u8; ROW] {
    let (mut row, roots) = ([0; ROW], moments.roots());
    for (bytes, (_, formula)) in row.as_chunks_mut().0.iter_mut().zip(FIGURES) {
        *bytes = formula(&roots).to_ne_bytes();
    }
    row
}
