//! The bits of every result are those of `golden.txt`, on every platform and with every compiler.
//!
//! Inputs are bit patterns from integer arithmetic alone, so that every platform starts from the same bytes. Each line of `golden.txt` is a
//! computation, an element type and a digest of all that it has computed. A change that means to change bits runs
//! `NORMCLIP_GOLDEN=write cargo test -p normclip-core --test golden`, commits the file, and says so in CHANGELOG.md.

mod common;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use normclip_core::kernels::{AdamW, Clamp, Map, Scale, Sgd, Statistics, Update, ZeroNonfinite};
use normclip_core::{BLOCK, Dtype, Isa, Pairs, Parameters, Team, apply, dot, measure, norm, reduce, update};

use common::random::Random;
use common::tensor::Tensor;
use common::{DTYPES, lent, team, to_read, to_write};

/// Lengths around those of lanes, rows, gathered pieces and blocks.
const SIZES: [usize; 7] = [0, 1, 31, 33, 300, 1025, BLOCK + 33];

const REAL: [Dtype; 4] = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64];

/// Which numbers the inputs hold.
#[derive(Clone, Copy)]
enum Numbers {
    /// Normal numbers between 2⁻⁸ and 2⁸.
    Ordinary,
    /// Every bit pattern that is finite: all magnitudes, subnormal numbers and zeros.
    Finite,
    /// Every bit pattern: NaN and infinities too.
    Any,
}

/// Significand bits, exponent bits and all bits of the real numbers that a type is made of.
fn format(dtype: Dtype) -> (u32, u32, u32) {
    match dtype {
        Dtype::F16 => (10, 5, 16),
        Dtype::Bf16 => (7, 8, 16),
        Dtype::F32 | Dtype::C64 => (23, 8, 32),
        Dtype::F64 | Dtype::C128 => (52, 11, 64),
    }
}

/// The bits of a number.
fn pattern(dtype: Dtype, numbers: Numbers, random: &mut Random) -> u64 {
    let (significand, exponents, all) = format(dtype);
    let bits = random.bits() >> (64 - all);
    let (largest, bias) = ((1 << exponents) - 1, (1 << (exponents - 1)) - 1);
    let exponent = match numbers {
        Numbers::Ordinary => bias - 8 + random.bits() % 16,
        Numbers::Finite => random.bits() % largest,
        // Only one in 500 is not finite, so that the finite ones matter to the results.
        Numbers::Any if random.bits().is_multiple_of(500) => largest,
        Numbers::Any => random.bits() % largest,
    };
    bits & !(largest << significand) | exponent << significand
}

fn tensors(dtype: Dtype, numbers: Numbers, seed: u64) -> Vec<Tensor> {
    let random = &mut Random(seed);
    let mut tensors: Vec<Tensor> = SIZES.iter().enumerate().map(|(i, &size)| Tensor::dense(dtype, size, i % 3)).collect();
    tensors.push(Tensor::strided(dtype, &[30, 50], &[1, 31], 0));
    tensors.push(Tensor::strided(dtype, &[20, 5, 3], &[-48, 3, 1], 0));
    tensors.into_iter().map(|tensor| tensor.of_patterns(|| pattern(dtype, numbers, random))).collect()
}

/// FNV-1a of 64-bit numbers.
struct Digest(u64);

impl Digest {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(mut self, bytes: impl IntoIterator<Item = u8>) -> Self {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self
    }

    fn numbers(self, numbers: impl IntoIterator<Item = f64>) -> Self {
        // The bits of a NaN that is a sum are not promised.
        let bits = numbers.into_iter().map(|number| if number.is_nan() { f64::NAN.to_bits() } else { number.to_bits() });
        self.bytes(bits.flat_map(u64::to_le_bytes))
    }

    fn tensors<'a>(self, tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        tensors.into_iter().fold(self, |digest, tensor| digest.bytes(tensor.bytes()))
    }
}

/// One list of tensors for each kind of numbers.
fn lists(dtype: Dtype) -> Vec<Vec<Tensor>> {
    [Numbers::Ordinary, Numbers::Finite, Numbers::Any].map(|numbers| tensors(dtype, numbers, 1)).into()
}

/// The results for each list, and for its tensors without the large ones.
fn norms(lists: &[Vec<Tensor>], order: f64, team: Team) -> u64 {
    let found = lists.iter().flat_map(|tensors| [&tensors[..], &tensors[..SIZES.len() - 1]]);
    Digest::new().numbers(found.map(|tensors| norm(&to_read(tensors), order, team)).collect::<Vec<_>>()).0
}

fn statistics(lists: &[Vec<Tensor>], finite_only: bool, team: Team) -> u64 {
    let rows = lists.iter().flat_map(|tensors| {
        let each = reduce(&to_read(tensors), Statistics { finite_only }, team);
        each.iter()
            .flat_map(|moments| {
                let derived = [
                    moments.l1(),
                    moments.l2(),
                    moments.roots().rms(),
                    moments.mean_abs(),
                    moments.roots().sign_cosine(),
                    moments.roots().density(),
                ];
                moments.to_array().into_iter().chain(derived)
            })
            .collect::<Vec<_>>()
    });
    Digest::new().numbers(rows.collect::<Vec<_>>()).0
}

fn products(x: Dtype, y: Dtype, team: Team) -> u64 {
    let found = [Numbers::Ordinary, Numbers::Finite].into_iter().flat_map(|numbers| {
        let (xs, ys) = (tensors(x, numbers, 3), tensors(y, numbers, 4));
        let pairs = Pairs::new(xs.iter().zip(&ys).map(|(x, y)| x.view_with(y)).collect());
        let products = dot(&pairs, team);
        [products.xy.value(), products.xx.norm(), products.yy.norm(), products.cosine()]
    });
    Digest::new().numbers(found.collect::<Vec<_>>()).0
}

fn mapped<M: Map>(dtype: Dtype, map: M, team: Team) -> u64 {
    [Numbers::Ordinary, Numbers::Finite, Numbers::Any]
        .into_iter()
        .fold(Digest::new(), |digest, numbers| {
            let tensors = tensors(dtype, numbers, 5);
            // SAFETY: the tensors are ours.
            unsafe { apply(&to_write(&tensors), map, team) };
            digest.tensors(&tensors)
        })
        .0
}

/// A step of parameters with so many states of a type, and the measure of the next one.
fn steps(dtype: Dtype, kept: Dtype, states: usize, by: impl Update, team: Team) -> [u64; 2] {
    let (xs, gs) = (tensors(dtype, Numbers::Ordinary, 6), tensors(dtype, Numbers::Ordinary, 8));
    let kept = |number: u64| {
        // All but the first are averages of squares, which are not negative.
        let signed = |tensor: Tensor| {
            let parts: Vec<f64> = tensor.parts().into_iter().map(|part| if number > 0 { part.abs() } else { part }).collect();
            tensor.holding(&parts)
        };
        tensors(kept, Numbers::Ordinary, 7 + 10 * number).into_iter().map(signed).collect::<Vec<_>>()
    };
    let kept: Vec<Vec<Tensor>> = (0..states.max(1) as u64).map(kept).collect();
    let of_parameter = |place: usize| {
        let its: Vec<&Tensor> = kept[..states].iter().map(|list| &list[place]).collect();
        let views = [&[&xs[place]][..], &its, &[&gs[place]]].concat().into_iter();
        views.map(|tensor| Tensor::views_of([&xs[place], tensor])[1].clone()).collect::<Vec<_>>()
    };
    let parameters = Parameters::new((0..xs.len()).flat_map(of_parameter).collect(), xs.iter().map(|_| states)).unwrap();
    // SAFETY: the tensors are ours.
    unsafe { update(&parameters, move |_| by, team) };
    // SAFETY: as above.
    let measured = unsafe { measure(&parameters, move |_| by, team) };
    let sums = measured.iter().flat_map(|sums| [sums.along.value(), sums.squares.value()]).collect::<Vec<_>>();
    [Digest::new().tensors(xs.iter().chain(kept.iter().flatten())).0, Digest::new().numbers(sums).0]
}

/// A tensor of more than a mebibyte, so that several threads have part in it: its norm, what it is scaled to, and its product with itself.
fn large(dtype: Dtype, team: Team) -> u64 {
    let random = &mut Random(9);
    let tensors = [Tensor::dense(dtype, 9 * BLOCK + 33, 0).of_patterns(|| pattern(dtype, Numbers::Ordinary, random))];
    let norm = norm(&to_read(&tensors), 2.0, team);
    let xy = dot(&Pairs::new(vec![tensors[0].view_with(&tensors[0])]), team).xy.value();
    // SAFETY: the tensors are ours.
    unsafe { apply(&to_write(&tensors), Scale { coefficient: 0.123_456_789 }, team) };
    Digest::new().numbers([norm, xy]).tensors(&tensors).0
}

/// All computations with one team, each as a line of the file.
fn digests(team: Team) -> String {
    let mut lines = String::new();
    let mut line = |what: &str, dtype: &str, digest: u64| writeln!(lines, "{what:<24} {dtype:<20} {digest:016x}").unwrap();
    for dtype in DTYPES {
        let lists = lists(dtype);
        for order in [2.0, 1.0, f64::INFINITY, f64::NEG_INFINITY, 0.0, 3.0, 4.0] {
            line(&format!("norm {order}"), dtype.name(), norms(&lists, order, team));
        }
        line("statistics", dtype.name(), statistics(&lists, false, team));
        line("statistics finite", dtype.name(), statistics(&lists, true, team));
        line("dot", dtype.name(), products(dtype, dtype, team));
        line("scale", dtype.name(), mapped(dtype, Scale { coefficient: 0.123_456_789 }, team));
    }
    for (x, y) in [(Dtype::F16, Dtype::F32), (Dtype::F32, Dtype::F64), (Dtype::C64, Dtype::C128)] {
        line("dot", &format!("{} {}", x.name(), y.name()), products(x, y, team));
    }
    line("large", Dtype::F32.name(), large(Dtype::F32, team));
    for dtype in REAL {
        line("scale to subnormal", dtype.name(), mapped(dtype, Scale { coefficient: 1.7e-41 }, team));
        line("clamp", dtype.name(), mapped(dtype, Clamp { limit: 0.71 }, team));
        line("zero nonfinite", dtype.name(), mapped(dtype, ZeroNonfinite, team));
        let mut stepped = |what: &str, [moved, measured]: [u64; 2]| {
            line(what, dtype.name(), moved);
            line(&format!("{what}, measured"), dtype.name(), measured);
        };
        let plain = Sgd { coefficient: 0.37, lr: 0.1, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
        stepped("sgd", steps(dtype, dtype, 0, plain, team));
        let full = Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.01, ..plain };
        stepped("sgd nesterov decay", steps(dtype, dtype, 1, full, team));
        let betas = [0.9, 0.999];
        let adamw = AdamW { coefficient: 0.37, lr: 0.1, betas, corrections: AdamW::corrections(betas, 9), eps: 1e-8, weight_decay: 0.01 };
        stepped("adamw", steps(dtype, dtype, 2, adamw, team));
        stepped("adamw amsgrad", steps(dtype, dtype, 3, adamw, team));
        if dtype.size() == 2 {
            stepped("adamw float32 states", steps(dtype, Dtype::F32, 2, adamw, team));
        }
    }
    lines
}

#[test]
fn results_have_the_committed_bits() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.txt");
    if std::env::var_os("NORMCLIP_GOLDEN").is_some_and(|what| what == "write") {
        fs::write(&path, digests(team(1, Isa::BASELINE))).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    for team in Isa::available().into_iter().flat_map(|isa| [team(1, isa), team(3, isa), lent(3, isa)]) {
        let found = digests(team);
        let differ: Vec<_> = found.lines().zip(committed.lines()).filter(|(found, committed)| found != committed).collect();
        assert!(differ.is_empty(), "{team:?}: found, and committed: {differ:#?}");
        assert_eq!(found.lines().count(), committed.lines().count());
    }
}
