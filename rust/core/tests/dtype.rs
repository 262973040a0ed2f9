//! Conversions of the 16-bit types, all of them, against the `half` crate.

mod common;

use half::{bf16, f16};
use normclip_core::{Bf16, Element, F16};
use proptest::prelude::*;

use common::cases;

#[test]
fn every_half_widens_exactly() {
    for bits in 0..=u16::MAX {
        let (found, expected) = (F16(bits).to_f32(), f16::from_bits(bits).to_f32());
        assert!(same(found, expected), "{bits:#06x}: {found:e}, not {expected:e}");
        assert!(F16(bits).wide().to_bits() == f64::from(found).to_bits() || found.is_nan(), "{bits:#06x}");
    }
}

#[test]
fn every_bfloat_widens_exactly() {
    for bits in 0..=u16::MAX {
        let (found, expected) = (Bf16(bits).to_f32(), bf16::from_bits(bits).to_f32());
        assert!(same(found, expected), "{bits:#06x}: {found:e}, not {expected:e}");
        assert!(Bf16(bits).wide().to_bits() == f64::from(found).to_bits() || found.is_nan(), "{bits:#06x}");
    }
}

/// Bits equal, or both NaN with the same sign.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan() && a.is_sign_negative() == b.is_sign_negative())
}

fn check_half(value: f32) {
    let (found, expected) = (F16::from_f32(value), f16::from_f32(value));
    let agree = found.0 == expected.to_bits();
    assert!(agree, "f16 of {value:e} ({:#010x}): {:#06x}, not {:#06x}", value.to_bits(), found.0, expected.to_bits());
}

fn check_bfloat(value: f32) {
    let (found, expected) = (Bf16::from_f32(value), bf16::from_f32(value));
    let agree = found.0 == expected.to_bits();
    assert!(agree, "bf16 of {value:e} ({:#010x}): {:#06x}, not {:#06x}", value.to_bits(), found.0, expected.to_bits());
}

/// The value and its neighbours in f32.
fn around(value: f32, check: impl Fn(f32)) {
    let bits = value.to_bits();
    [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].into_iter().map(f32::from_bits).for_each(check);
}

#[test]
fn halves_and_the_midpoints_between_them_round_to_even() {
    for bits in 0..=u16::MAX {
        let value = f16::from_bits(bits).to_f32();
        around(value, check_half);
        // The next half after the largest would be 65536. Numbers from the midpoint below it on are rounded to infinity.
        let next = match f16::from_bits(bits.wrapping_add(1)).to_f32() {
            next if next.is_infinite() => 65536f32.copysign(value),
            next => next,
        };
        if value.is_finite() && next.is_finite() {
            around((value + next) / 2.0, check_half);
        }
    }
}

#[test]
fn bfloats_and_the_midpoints_between_them_round_to_even() {
    for bits in 0..=u16::MAX {
        let value = u32::from(bits) << 16;
        around(f32::from_bits(value), check_bfloat);
        around(f32::from_bits(value | 0x8000), check_bfloat);
    }
}

#[test]
fn halves_overflow_at_65520() {
    // Every f32 from the largest half to above that midpoint, and other numbers that are out of the half's range.
    for bits in 65504f32.to_bits()..=65536f32.to_bits() {
        check_half(f32::from_bits(bits));
        check_half(-f32::from_bits(bits));
    }
    assert_eq!(F16::from_f32(65519.996).0, 0x7bff);
    assert_eq!(F16::from_f32(65520.0).0, 0x7c00);
    for value in [f32::MAX, f32::INFINITY, f32::NAN, -f32::NAN, f32::MIN_POSITIVE, f32::from_bits(1), 0.0, -0.0] {
        check_half(value);
        check_half(-value);
        check_bfloat(value);
        check_bfloat(-value);
    }
}

/// The absolute bits as an integer, which has the order of the absolute values, with infinity above them and NaN above infinity.
fn check_order<E: Element>(values: &[E]) {
    for (&a, &b) in values.iter().zip(&values[1..]) {
        let (x, y) = (a.wide().abs(), b.wide().abs());
        let (p, q): (u64, u64) = (a.abs_bits().into(), b.abs_bits().into());
        if x.is_nan() || y.is_nan() {
            assert!(x.is_nan() && y.is_nan() || (p > q) == x.is_nan());
        } else {
            assert_eq!(p.cmp(&q), x.partial_cmp(&y).unwrap(), "{x:e} {y:e}");
        }
        assert!(a.with_abs_bits(a.abs_bits()).wide().to_bits() == a.wide().to_bits() || x.is_nan());
        assert!(a.with_abs_bits(b.abs_bits()).wide().to_bits() == y.copysign(a.wide()).to_bits() || x.is_nan() || y.is_nan());
    }
}

#[test]
fn bits_order_as_numbers_do() {
    let all: Vec<u16> = (0..=u16::MAX).map(|i| i.wrapping_mul(40503)).collect();
    check_order(&all.iter().map(|bits| F16(*bits)).collect::<Vec<_>>());
    check_order(&all.iter().map(|bits| Bf16(*bits)).collect::<Vec<_>>());
    let random = |i: u16| u64::from(i).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    check_order(&all.iter().map(|i| f32::from_bits(random(*i) as u32)).collect::<Vec<_>>());
    check_order(&all.iter().map(|i| f64::from_bits(random(*i))).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(cases(20_000))]

    #[test]
    fn any_float_rounds_as_half_does(bits: u32) {
        check_half(f32::from_bits(bits));
        check_bfloat(f32::from_bits(bits));
        // Most f32 are out of the half's range, so the exponent is moved into it.
        check_half(f32::from_bits(bits & 0x8fff_ffff | 0x3000_0000));
    }

    #[test]
    fn doubles_narrow_by_way_of_f32(bits: u64) {
        let value = f64::from_bits(bits & 0xbfff_ffff_ffff_ffff);
        prop_assume!(!value.is_nan());
        prop_assert_eq!(F16::narrow(value).0, f16::from_f32(value as f32).to_bits());
        prop_assert_eq!(Bf16::narrow(value).0, bf16::from_f32(value as f32).to_bits());
        prop_assert_eq!(f32::narrow(value).to_bits(), (value as f32).to_bits());
        prop_assert_eq!(f64::narrow(value).to_bits(), value.to_bits());
    }
}
