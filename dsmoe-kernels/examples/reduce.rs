//! Sums an array over processes, so that the bits do not depend on their number, and measures how fast that is:
//! `mpirun -n 4 target/release/examples/reduce [MiB per call] [MiB in all]`. Also runs alone.
#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::time::Instant;

use dsmoe_kernels::comm::tree::{Tree, sum_parts};
use dsmoe_kernels::comm::{CommError, Communicator, Engine, Settings, What, start};
use dsmoe_kernels::testing::normals;

/// The terms of the sum. Each process adds its share, a number of neighbours.
const TERMS: usize = 16;
const REPEATS: usize = 7;

fn main() -> Result<(), CommError> {
    let settings = Settings { deadline: Settings::DEADLINE, last_words: |error| println!("{error}") };
    let comm = start(Engine::Auto, settings)?;
    let mut mib = std::env::args().skip(1).map(|argument| argument.parse().expect("a number of MiB"));
    let (bucket, all) = (mib.next().unwrap_or(1) << 18, mib.next().unwrap_or(4) << 18);
    let (size, rank) = (comm.size(), comm.rank());
    assert!(TERMS.is_multiple_of(size), "a number of processes that divides {TERMS}");

    let values = normals(1 << 16, 1);
    let mut tree = Tree::new();
    let mut own = dsmoe_kernels::buf::Buf::zeros(all);
    for term in rank * TERMS / size..(rank + 1) * TERMS / size {
        let values = values.iter().cycle().skip(term * 4099);
        own.iter_mut().zip(values).for_each(|(own, value)| *own = *value);
        tree.push(&mut own);
    }
    tree.finish(&mut own);

    let share = (size - 1) as f64 / size as f64 * (4 * all) as f64;
    let report = |what: &str, bytes: f64, seconds: f64| {
        if rank == 0 {
            println!("{what:24} {:9.3} ms  {:6.2} GB/s", seconds * 1e3, bytes / seconds / 1e9);
        }
    };
    let mut buffers = [vec![0.0_f32; bucket], vec![0.0; bucket]];
    let mut shard = vec![0.0_f32; all / size];
    report("all-to-all and tree", share, best(&*comm, || scatter(&*comm, &own, &mut buffers, &mut shard))?);
    let mut sum = vec![0.0_f32; all];
    let lens = vec![4 * shard.len(); size];
    let gather = || {
        comm.all_gather(
            What::of("sums"),
            bytemuck::cast_slice(&shard),
            bytemuck::cast_slice_mut(&mut sum),
            &lens,
        )
    };
    report("all-gather", share, best(&*comm, gather)?);
    report("barrier", 0.0, best(&*comm, || comm.barrier(What::of("start")))?);
    let hash = sum.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, x| {
        (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3)
    });
    if rank == 0 {
        println!("{size} processes, {} MiB in calls of {}: bits {hash:016x}", all >> 18, bucket >> 18);
    }
    Ok(())
}

/// The shortest time of `work` among repeated ones, in seconds.
fn best(comm: &dyn Communicator, mut work: impl FnMut() -> Result<(), CommError>) -> Result<f64, CommError> {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        comm.barrier(What::of("start"))?;
        let began = Instant::now();
        work()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Sets `shard` to this process's part of the sum of all processes' `own`, by calls that move as much as `send` and `recv`
/// hold.
fn scatter(
    comm: &dyn Communicator,
    own: &[f32],
    [send, recv]: &mut [Vec<f32>; 2],
    shard: &mut [f32],
) -> Result<(), CommError> {
    let size = comm.size();
    let (len, part) = (shard.len(), send.len() / size);
    for (at, shard) in shard.chunks_mut(part).enumerate() {
        let values = shard.len();
        for (to, piece) in send.chunks_mut(values).take(size).enumerate() {
            piece.copy_from_slice(&own[to * len + at * part..][..values]);
        }
        let (send, recv) = (&send[..values * size], &mut recv[..values * size]);
        let lens = vec![4 * values; size];
        let bytes = bytemuck::cast_slice_mut(recv);
        comm.all_to_all(What::of("terms"), bytemuck::cast_slice(send), &lens, bytes, &lens)?;
        sum_parts(recv, values);
        shard.copy_from_slice(&recv[..values]);
    }
    Ok(())
}
