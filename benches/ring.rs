//! What a message costs on the ring itself, and what its header costs in the codec: no system call, one thread.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use vsocket_channel::layout::Direction;
use vsocket_channel::ring::{Bytes, Ring};
use vsocket_vxlan::{Flags, Segment, Stay, Vni};

/// A message through a ring of 1 MiB: copied in, published, found, copied out, released.
fn ring(c: &mut Criterion) {
    let mut memory = vec![0u8; 1 << 20];
    // SAFETY: the buffer outlives the benchmark and has a power of two of bytes.
    let bytes = unsafe { Bytes::new(memory.as_mut_ptr(), memory.len()) };
    // SAFETY: atomics only, for which zero is valid.
    let direction: Direction = unsafe { std::mem::zeroed() };
    let ring = Ring { indices: &direction, bytes: &bytes };
    let mut group = c.benchmark_group("ring");
    let mut at = 0u64;
    for len in [8usize, 64, 1024, 65536] {
        let (message, mut out) = (vec![7u8; len], vec![0u8; len]);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} B"), |b| {
            b.iter(|| {
                assert!(ring.space(at).is_ok_and(|n| n >= len));
                bytes.put(at, black_box(&message));
                ring.publish(at + len as u64);
                assert_eq!(ring.available(at), Ok(len));
                bytes.get(at, black_box(&mut out));
                at += len as u64;
                ring.release(at);
            });
        });
    }
    group.finish();
}

/// The header of a data segment, written and read.
fn codec(c: &mut Criterion) {
    let segment = Segment {
        vni: Vni::new(100).expect("24 bits"),
        src_mac: [2, 0, 0, 0, 0, 1],
        dst_mac: [2, 0, 0, 0, 0, 2],
        src: ([198, 51, 100, 1], 4000).into(),
        dst: ([198, 51, 100, 3], 6379).into(),
        seq: 1,
        ack: 2,
        window: 1 << 20,
        flags: Flags::ACK,
        stay: Stay { generation: 1, open: None },
    };
    let mut out = [0u8; 256];
    c.bench_function("vxlan encapsulate 64 B", |b| {
        b.iter(|| vsocket_vxlan::encapsulate(black_box(&segment), &[7; 64], &mut out));
    });
    let n = vsocket_vxlan::encapsulate(&segment, &[7; 64], &mut out).expect("fits");
    c.bench_function("vxlan decapsulate 64 B", |b| {
        b.iter(|| vsocket_vxlan::decapsulate(black_box(&out[..n]), vsocket_vxlan::PayloadAt::Inline));
    });
}

criterion_group!(benches, ring, codec);
criterion_main!(benches);
