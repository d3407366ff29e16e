//! Cases that every communicator passes.

use super::{Communicator, What};

const OF: What = What::of("bytes");

/// Moves bytes by every call, and panics if others arrive than were sent. The lengths of pieces are multiples of `unit`; some
/// are 0.
pub(super) fn moves_the_right_bytes(comm: &dyn Communicator, unit: usize) {
    let piece = |from: usize, to: usize| vec![(16 * from + to) as u8; (from + 2 * to) % 5 * unit];
    let lens = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).collect::<Vec<_>>();
    let (me, all) = (comm.rank(), 0..comm.size());
    let send: Vec<Vec<u8>> = all.clone().map(|to| piece(me, to)).collect();
    let want: Vec<Vec<u8>> = all.clone().map(|from| piece(from, me)).collect();
    let mut recv = vec![0; want.concat().len()];
    for _ in 0..3 {
        comm.all_to_all(OF, &send.concat(), &lens(&send), &mut recv, &lens(&want)).unwrap();
        assert!(recv == want.concat(), "all-to-all");
        comm.barrier(OF).unwrap();
    }
    let want: Vec<Vec<u8>> = all.clone().map(|from| piece(from, 1)).collect();
    let mut recv = vec![0; want.concat().len()];
    comm.all_gather(OF, &piece(me, 1), &mut recv, &lens(&want)).unwrap();
    assert!(recv == want.concat(), "all-gather");
    for from in all {
        let mut bytes = [me as u8; 3];
        comm.broadcast(OF, from, &mut bytes).unwrap();
        assert_eq!(bytes, [from as u8; 3], "broadcast");
    }
}
