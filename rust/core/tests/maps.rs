//! Scaling and clamping in place, against the arithmetic of one element.

mod common;

use half::{bf16, f16};
use normclip_core::kernels::{Clamp, Map, Scale, ZeroNonfinite};
use normclip_core::{Dtype, Problem, View, WritableTensors, apply, apply_each, check_real};
use proptest::prelude::*;
use proptest::sample::select;

use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{DTYPES, cases, teams, to_read, to_write};

/// Factors: below the smallest normal f32, above the largest f32, and common ones.
const COEFFICIENTS: [f64; 12] = [0.5, -1.0, 0.0, 0.1, 1.0 / 3.0, 1e-7, 1e-30, 1e-39, 1e-46, 1e-200, 1e20, 1e39];

const LIMITS: [f64; 8] = [0.0, 1e-46, 1e-7, 0.1, 1.0, 65519.0, 1e39, f64::INFINITY];

fn scaled(dtype: Dtype, x: f64, coefficient: f64) -> f64 {
    let fits = coefficient == 0.0 || (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&coefficient.abs());
    let single = if fits { x as f32 * coefficient as f32 } else { (x * coefficient) as f32 };
    match dtype {
        Dtype::F16 => f16::from_f32(single).to_f64(),
        Dtype::Bf16 => bf16::from_f32(single).to_f64(),
        Dtype::F32 | Dtype::C64 => f64::from(single),
        Dtype::F64 | Dtype::C128 => x * coefficient,
    }
}

fn clamped(dtype: Dtype, x: f64, limit: f64) -> f64 {
    let limit = match dtype {
        Dtype::F16 => f16::from_f32(limit as f32).to_f64(),
        Dtype::Bf16 => bf16::from_f32(limit as f32).to_f64(),
        Dtype::F32 | Dtype::C64 => f64::from(limit as f32),
        Dtype::F64 | Dtype::C128 => limit,
    };
    if x.abs() > limit { limit.copysign(x) } else { x }
}

/// Whether both have the same bits, or both are NaN.
fn same(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Changes the tensor and compares each element with what it should be, and all else with what it was. True if the tensor is listed as changed.
fn check(tensor: &Tensor, map: impl Map, expected: impl Fn(f64) -> f64, seed: u64) -> Result<bool, TestCaseError> {
    let (before, gaps) = (tensor.parts(), tensor.gaps());
    let teams = teams();
    // SAFETY: the tensor is ours and outlives the list.
    let changed = unsafe { apply(&to_write([tensor]), map, teams[seed as usize % teams.len()]) };
    for (x, after) in before.iter().zip(tensor.parts()) {
        let expected = expected(*x);
        prop_assert!(same(after, expected), "{x:e} became {after:e}, not {expected:e}");
    }
    prop_assert!(tensor.gaps() == gaps, "bytes outside of the tensor have changed");
    prop_assert!(changed.is_empty() || changed == [0]);
    Ok(!changed.is_empty())
}

/// A tensor of a random layout that can be written. Some tensors hold non-finite numbers.
fn tensor(dtype: Dtype, dense: bool, offset: usize, random: &mut Random) -> Tensor {
    let tensor = if dense {
        Tensor::dense(dtype, random.below(3000), offset)
    } else {
        let (shape, strides) = random.layout(3000);
        Tensor::strided(dtype, &shape, &strides, offset)
    };
    let tensor = tensor.filled(Magnitudes::any(dtype, random), random);
    let mut parts = tensor.parts();
    if random.below(3) == 0 && !parts.is_empty() {
        for special in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, -0.0] {
            let place = random.below(parts.len());
            parts[place] = special;
        }
    }
    tensor.holding(&parts)
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn scaling(dtype in select(&DTYPES), coefficient in select(&COEFFICIENTS), dense: bool, offset in 0..16usize, seed: u64) {
        let tensor = tensor(dtype, dense, offset, &mut Random(seed));
        let changed = check(&tensor, Scale { coefficient }, |x| scaled(dtype, x, coefficient), seed)?;
        prop_assert_eq!(changed, tensor.len() > 0);
    }

    #[test]
    fn clamping(dtype in select(&DTYPES), limit in select(&LIMITS), dense: bool, offset in 0..16usize, seed: u64) {
        let tensor = tensor(dtype, dense, offset, &mut Random(seed));
        let (parts, bytes) = (tensor.parts(), tensor.bytes());
        let changed = check(&tensor, Clamp { limit }, |x| clamped(dtype, x, limit), seed)?;
        let exceeds = parts.iter().any(|x| !same(clamped(dtype, *x, limit), *x));
        prop_assert_eq!(changed, exceeds, "NaN is no reason to write");
        prop_assert!(exceeds || tensor.bytes() == bytes, "all is within the limit and yet some bits have changed");
    }

    #[test]
    fn zeroing(dtype in select(&DTYPES), dense: bool, offset in 0..16usize, seed: u64) {
        let tensor = tensor(dtype, dense, offset, &mut Random(seed));
        let (found, bytes) = (tensor.parts().iter().any(|x| !x.is_finite()), tensor.bytes());
        prop_assert_eq!(check(&tensor, ZeroNonfinite, |x| if x.is_finite() { x } else { 0.0 }, seed)?, found);
        prop_assert!(found || tensor.bytes() == bytes);
    }

    #[test]
    fn any_coefficient(dtype in select(&DTYPES), coefficient in any::<f64>(), seed: u64) {
        prop_assume!(coefficient.is_finite());
        let tensor = tensor(dtype, true, 0, &mut Random(seed));
        check(&tensor, Scale { coefficient }, |x| scaled(dtype, x, coefficient), seed)?;
    }
}

/// Tensors of ones, each of another layout, one of them empty.
fn ones() -> Vec<Tensor> {
    let tensors = [
        Tensor::dense(Dtype::F32, 100_000, 0),
        Tensor::strided(Dtype::F64, &[300, 400], &[1, 300], 0),
        Tensor::dense(Dtype::F16, 0, 0),
        Tensor::strided(Dtype::Bf16, &[10, 3], &[5, 1], 0),
        Tensor::dense(Dtype::F16, 7, 0),
    ];
    tensors
        .into_iter()
        .map(|tensor| {
            let ones = vec![1.0; tensor.len()];
            tensor.holding(&ones)
        })
        .collect()
}

#[test]
fn repeated_tensors_change_once() {
    for team in teams() {
        let tensors = ones();
        let mut views: Vec<_> = tensors.iter().map(Tensor::view).collect();
        views.extend(tensors.iter().rev().map(Tensor::view_reversed));
        views.extend(tensors.iter().map(Tensor::view));
        let list = WritableTensors::new(views).unwrap();
        // SAFETY: the tensors are ours and outlive the list.
        let changed = unsafe { apply(&list, Scale { coefficient: 0.5 }, team) };
        assert_eq!(changed, [0, 1, 3, 4], "the first of each, and not the empty one");
        assert!(tensors.iter().all(|tensor| tensor.parts().iter().all(|x| *x == 0.5)));
    }
}

#[test]
fn only_tensors_beyond_the_limit_are_listed() {
    for team in teams() {
        let mut tensors = ones();
        // One element above the limit: far into a tensor of several blocks, and at the end of a small one.
        for (index, place) in [(1, 70_000), (4, 6)] {
            let mut parts = tensors[index].parts();
            parts[place] = -3.0;
            let tensor = tensors.remove(index).holding(&parts);
            tensors.insert(index, tensor);
        }
        // SAFETY: the tensors are ours and outlive the list.
        let clamp = |limit| unsafe { apply(&to_write(&tensors), Clamp { limit }, team) };
        assert_eq!(clamp(3.0), []);
        assert_eq!(clamp(2.0), [1, 4]);
        assert_eq!(clamp(2.0), []);
        assert_eq!((tensors[1].parts()[70_000], tensors[4].parts()[6]), (-2.0, -2.0));
        assert_eq!(clamp(0.0), [0, 1, 3, 4]);
    }
}

#[test]
fn each_tensor_by_its_own_coefficient() {
    for team in teams() {
        let tensors = ones();
        let scale_of = |index: usize| (index != 1).then_some(Scale { coefficient: index as f64 });
        // SAFETY: the tensors are ours and outlive the list.
        let changed = unsafe { apply_each(&to_write(&tensors), scale_of, team) };
        assert_eq!(changed, [0, 3, 4]);
        for (tensor, expected) in tensors.iter().zip([0.0, 1.0, 2.0, 3.0, 4.0]) {
            assert!(tensor.parts().iter().all(|x| *x == expected));
        }
    }
}

#[cfg(unix)]
#[test]
fn memory_within_the_limit_may_be_read_only() {
    use std::alloc::{self, Layout};
    use std::ffi::c_void;

    const PAGE: usize = 1 << 16;
    const BYTES: usize = 20 * PAGE;
    const READ: i32 = 1;
    const READ_WRITE: i32 = 3;
    unsafe extern "C" {
        fn mprotect(address: *mut c_void, len: usize, protection: i32) -> i32;
    }

    let layout = Layout::from_size_align(BYTES, PAGE).unwrap();
    // SAFETY: the memory is zeroed, consists of whole pages with nothing else in them, and is writable again before it is freed.
    unsafe {
        let memory = alloc::alloc_zeroed(layout);
        let view = View::new(memory, Dtype::F32, &[(BYTES / 4) as i64], None).unwrap();
        let list = WritableTensors::new(vec![view]).unwrap();
        assert_eq!(mprotect(memory.cast(), BYTES, READ), 0);
        for team in teams() {
            assert_eq!(apply(&list, Clamp { limit: 0.0 }, team), []);
        }
        assert_eq!(mprotect(memory.cast(), BYTES, READ_WRITE), 0);
        alloc::dealloc(memory, layout);
    }
}

#[test]
fn complex_tensors_are_named_before_clamping() {
    let tensors = [Tensor::dense(Dtype::F32, 3, 0), Tensor::dense(Dtype::C64, 3, 0)];
    let error = check_real(to_read(&tensors).views()).unwrap_err();
    assert_eq!((error.index, error.problem), (1, Problem::Complex));
    assert_eq!(check_real(to_read(&tensors[..1]).views()), Ok(()));
}
