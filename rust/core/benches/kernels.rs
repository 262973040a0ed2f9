//! Kernels × instruction sets × element types, on one thread and in cache: `cargo bench -p normclip-core`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use normclip_core::kernels::{
    Abs, Clamp, Count, Elements, Integer, Kernel, Map, MaxAbs, MinAbs, Real, Scale, Sgd, Statistics, SumOf, SumPowers, SumSquares, Update,
};
use normclip_core::{BLOCK, Bf16, Element, F16, Isa};

fn values<E: Element>() -> Vec<E> {
    (0..BLOCK).map(|i| E::narrow(((i * 2_654_435_761) % 1000) as f64 * 1e-3 - 0.5)).collect()
}

fn reduce<E: Element, K: Kernel>(c: &mut Criterion, name: &str, dtype: &str, kernel: K) {
    let values = values::<E>();
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(size_of_val(values.as_slice()) as u64));
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new(dtype, isa.name()), |b| b.iter(|| kernel.block(&Elements::slice(isa, black_box(&values)))));
    }
}

fn map<E: Element, M: Map>(c: &mut Criterion, name: &str, dtype: &str, map: M) {
    let mut values = values::<E>();
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(2 * size_of_val(values.as_slice()) as u64));
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new(dtype, isa.name()), |b| b.iter(|| map.apply(isa, black_box(&mut values))));
    }
}

fn sgd<E: Element>(c: &mut Criterion, dtype: &str, momentum: f64) {
    let [mut parameters, mut buffer, gradients] = [(); 3].map(|()| values::<E>());
    let (name, passes) = if momentum == 0.0 { ("sgd", 3) } else { ("sgd_momentum", 5) };
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(passes * size_of_val(gradients.as_slice()) as u64));
    let sgd = Sgd { coefficient: 0.5, lr: 1e-3, momentum, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new(dtype, isa.name()), |b| {
            b.iter(|| {
                let states = &mut [buffer.as_mut_slice()][..usize::from(momentum != 0.0)];
                sgd.apply(isa, black_box(&mut parameters), black_box(states), black_box(&gradients));
            });
        });
    }
}

fn all<E: Element>(c: &mut Criterion, dtype: &str) {
    reduce::<E, _>(c, "sum_squares", dtype, SumSquares);
    reduce::<E, _>(c, "sum_abs", dtype, SumOf(Abs));
    reduce::<E, _>(c, "max_abs", dtype, MaxAbs);
    reduce::<E, _>(c, "min_abs", dtype, MinAbs);
    reduce::<E, _>(c, "count", dtype, Count);
    reduce::<E, _>(c, "statistics", dtype, Statistics { finite_only: false });
    reduce::<E, _>(c, "power_3", dtype, SumPowers(Integer::<3>));
    reduce::<E, _>(c, "power_2.5", dtype, SumPowers(Real(2.5)));
    map::<E, _>(c, "scale", dtype, Scale { coefficient: -1.0 });
    map::<E, _>(c, "clamp", dtype, Clamp { limit: 0.25 });
    sgd::<E>(c, dtype, 0.0);
    sgd::<E>(c, dtype, 0.9);
}

fn kernels(c: &mut Criterion) {
    all::<F16>(c, "f16");
    all::<Bf16>(c, "bf16");
    all::<f32>(c, "f32");
    all::<f64>(c, "f64");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
    targets = kernels
}
criterion_main!(benches);
