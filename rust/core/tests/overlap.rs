//! Which lists of tensors may be written, against a map of every byte.

mod common;

use std::ptr;

use normclip_core::{Dtype, Problem, TensorError, Tensors, View, WritableTensors};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use common::cases;
use common::tensor::offsets;

/// The bytes of the common memory: 64 of the widest elements below.
const MEMORY: i64 = 512;

/// A tensor in the common memory.
#[derive(Clone, Debug)]
struct Part {
    dtype: Dtype,
    shape: Vec<i64>,
    strides: Vec<i64>,
    origin: i64,
}

impl Part {
    /// The bytes of each element.
    fn elements(&self) -> Vec<usize> {
        offsets(self.dtype, &self.shape, &self.strides, self.origin)
    }

    /// How often each byte is reached.
    fn bytes(&self) -> Vec<u32> {
        let mut bytes = vec![0; MEMORY as usize];
        for element in self.elements() {
            bytes[element..element + self.dtype.size()].iter_mut().for_each(|count| *count += 1);
        }
        bytes
    }

    fn is_expanded(&self) -> bool {
        self.bytes().into_iter().any(|count| count > 1)
    }

    fn meets(&self, other: &Self) -> bool {
        self.bytes().into_iter().zip(other.bytes()).any(|(a, b)| a > 0 && b > 0)
    }

    /// Whether both are the same elements.
    fn equals(&self, other: &Self) -> bool {
        let sorted = |part: &Self| {
            let mut elements = part.elements();
            elements.sort_unstable();
            elements
        };
        self.dtype == other.dtype && sorted(self) == sorted(other)
    }

    /// The same elements, with the dimensions in opposite order and read backwards.
    fn reversed(&self) -> Self {
        let last: i64 = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1).max(0) * stride).sum();
        Self {
            dtype: self.dtype,
            shape: self.shape.iter().rev().copied().collect(),
            strides: self.strides.iter().rev().map(|stride| -stride).collect(),
            origin: self.origin + last * self.dtype.size() as i64,
        }
    }

    /// A view that is only looked at: nothing is read or written through it.
    fn view(&self, memory: &mut [u8]) -> View {
        // SAFETY: all elements lie in the memory, by construction of the origin.
        unsafe {
            View::new(memory.as_mut_ptr().wrapping_offset(self.origin as isize), self.dtype, &self.shape, Some(&self.strides)).unwrap()
        }
    }
}

/// Shapes and strides so small that they often meet, expand or interleave.
fn part() -> impl Strategy<Value = Part> {
    let dims = prop::collection::vec((0..=4i64, -6..=6i64), 0..=3);
    (select(&[Dtype::F16, Dtype::F32, Dtype::C64]), dims, any::<bool>(), any::<Index>()).prop_map(|(dtype, dims, whole, place)| {
        // A few empty tensors suffice.
        let (shape, strides): (Vec<i64>, Vec<i64>) =
            dims.into_iter().map(|(size, stride)| (if whole { size.max(1) } else { size }, stride)).unzip();
        let size = dtype.size() as i64;
        let reach = |sign: i64| -> i64 {
            shape.iter().zip(&strides).map(|(size, stride)| (size - 1).max(0) * (sign * stride).max(0)).sum::<i64>() * size
        };
        let (before, after) = (reach(-1), reach(1) + size);
        // The first element may be at any byte.
        let origin = before + place.index((MEMORY - before - after + 1) as usize) as i64;
        Part { dtype, shape, strides, origin }
    })
}

/// Two or three tensors. Sometimes one of them is listed again, described by other shapes and strides.
fn parts() -> impl Strategy<Value = Vec<Part>> {
    (prop::collection::vec(part(), 1..=3), any::<Option<Index>>()).prop_map(|(mut parts, again)| {
        if let Some(again) = again {
            parts.push(again.get(&parts).reversed());
        }
        parts
    })
}

fn views(parts: &[Part]) -> Vec<View> {
    let mut memory = vec![0; MEMORY as usize];
    parts.iter().map(|part| part.view(&mut memory)).collect()
}

proptest! {
    #![proptest_config(cases(10_000))]

    #[test]
    fn a_list_is_writable_if_no_byte_is_shared(parts in parts()) {
        let pairs = || parts.iter().enumerate().flat_map(|(i, a)| parts[..i].iter().map(move |b| (a, b)));
        let shared = pairs().any(|(a, b)| a.meets(b) && !a.equals(b));
        let expanded = parts.iter().any(Part::is_expanded);
        match WritableTensors::new(views(&parts)) {
            Ok(tensors) => {
                prop_assert!(!shared && !expanded, "accepted");
                let distinct = parts.iter().enumerate().filter(|(i, part)| parts[..*i].iter().all(|earlier| !earlier.equals(part)));
                let elements: usize = distinct.map(|(_, part)| part.elements().len()).sum();
                prop_assert_eq!(tensors.len(), elements);
            }
            Err(TensorError { index, problem: Problem::Expanded }) => prop_assert!(parts[index].is_expanded(), "tensor {index} is not expanded"),
            Err(TensorError { index, problem: Problem::Overlaps(other) }) => {
                prop_assert!(index != other && parts[index].meets(&parts[other]), "tensor {index} does not meet {other}");
                prop_assert!(shared || expanded, "refused");
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn any_list_is_readable(parts in parts()) {
        let tensors = Tensors::new(views(&parts));
        let elements: usize = parts.iter().map(|part| part.elements().len()).sum();
        prop_assert!(tensors.len() <= elements);
        prop_assert_eq!(tensors.views().len(), parts.len());
    }
}

#[test]
fn the_same_bytes_as_another_type_are_an_overlap() {
    let part = |dtype, len| Part { dtype, shape: vec![len], strides: vec![1], origin: 0 };
    let error = WritableTensors::new(views(&[part(Dtype::F32, 8), part(Dtype::F16, 16)])).unwrap_err();
    assert!(matches!(error.problem, Problem::Overlaps(_)));
}

#[test]
fn an_expanded_tensor_is_not_said_to_overlap_its_neighbour() {
    let neighbour = Part { dtype: Dtype::F32, shape: vec![2], strides: vec![2], origin: 0 };
    // 7 = 1 + 3·2 = 1 + 2·3, in a range with room for all of its elements.
    let expanded = Part { dtype: Dtype::F32, shape: vec![4, 3], strides: vec![2, 3], origin: 4 };
    assert!(expanded.is_expanded() && !expanded.meets(&neighbour));
    let error = WritableTensors::new(views(&[neighbour, expanded])).unwrap_err();
    assert_eq!(error, TensorError { index: 1, problem: Problem::Expanded });
}

/// What would take a bit for each of some terabytes, and half a million pairs.
#[test]
fn large_strided_tensors_are_told_apart_by_their_strides() {
    const COLUMNS: i64 = 1000;
    let base = ptr::without_provenance_mut::<u8>(1 << 40);
    // SAFETY: descriptions alone: nothing is read or written.
    let part = |offset: i64, shape: &[i64], strides: &[i64]| unsafe {
        View::new(base.wrapping_offset(4 * offset as isize), Dtype::F32, shape, Some(strides)).unwrap()
    };
    let check = |views: Vec<View>| WritableTensors::new(views).map(drop).map_err(|error| error.problem);
    let column = |k: i64, width: i64| part(k << 10, &[1 << 20, width], &[COLUMNS << 10, 1]);
    assert_eq!(check((0..COLUMNS).rev().map(|k| column(k, 1 << 10)).collect()), Ok(()));
    let wide = (0..COLUMNS).map(|k| column(k, if k == 400 { (1 << 10) + 1 } else { 1 << 10 })).collect();
    assert_eq!(check(wide), Err(Problem::Overlaps(400)));
    let planes = |k: i64| part(k, &[1 << 10, 1 << 10, 1 << 10], &[1 << 30, 1 << 15, 8]);
    assert_eq!(check((0..8).map(planes).collect()), Ok(()), "every eighth");
    assert!(check((0..9).map(planes).collect()).is_err());
    // The largest strides differ, and one tensor has the odd elements, the other the even ones.
    assert_eq!(check(vec![part(0, &[1 << 20, 50], &[100, 2]), part(1, &[1 << 20, 51], &[102, 2])]), Ok(()));
    assert!(check(vec![part(0, &[1 << 20, 50], &[100, 2]), part(1, &[1 << 20, 51], &[103, 2])]).is_err());
}

#[test]
fn a_tensor_may_be_listed_many_times() {
    let same = Part { dtype: Dtype::F32, shape: vec![8], strides: vec![1], origin: 0 };
    let tensors = WritableTensors::new(views(&vec![same; 200_000])).unwrap();
    assert_eq!((tensors.len(), tensors.repetitions().len()), (8, 199_999));
}

#[test]
fn elements_without_memory_are_refused() {
    // SAFETY: the view is refused, or has no elements.
    let null = |shape: &[i64], strides: Option<&[i64]>| unsafe { View::new(ptr::null_mut(), Dtype::F32, shape, strides) };
    assert_eq!(null(&[], None), Err(Problem::NullData), "a scalar has one element");
    assert_eq!(null(&[2, 3], Some(&[1, 2])), Err(Problem::NullData));
    let empty = vec![null(&[0], None).unwrap(), null(&[3, 0, 2], Some(&[0, 1, 1])).unwrap()];
    assert!(Tensors::new(empty.clone()).is_empty());
    assert!(WritableTensors::new(empty).unwrap().is_empty());
}
