//! The meeting of processes: all connect to the first, which tells them the addresses of the others.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::super::communicator::Place;

/// The first bytes of every connection.
const MAGIC: [u8; 8] = *b"dsmoe 1\n";
/// Bytes of a greeting: the magic, rank, size, port, machine and job.
const GREETING: usize = 36;
/// Bytes of an address in the table of the first process: IP, port and machine.
const ADDRESS: usize = 28;
/// The most processes of a job.
const MOST: usize = 1 << 16;
/// How long a connection that has been made may take to say what it is.
const TO_GREET: Duration = Duration::from_secs(10);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// The settings of a process from its launcher's variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) address: String,
    /// The port of the meeting: the one after the launcher's own.
    pub(super) port: u16,
    /// Tells jobs apart.
    pub(super) job: u64,
}

/// The first message of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Greeting {
    rank: usize,
    size: usize,
    /// Where it waits for others.
    port: u16,
    machine: u64,
    job: u64,
}

impl Greeting {
    fn bytes(self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        bytes[..8].copy_from_slice(&MAGIC);
        let numbers = [self.rank as u32, self.size as u32, u32::from(self.port)];
        for (to, number) in bytes[8..20].as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
            *to = number.to_le_bytes();
        }
        bytes[20..28].copy_from_slice(&self.machine.to_le_bytes());
        bytes[28..].copy_from_slice(&self.job.to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8; GREETING]) -> Option<Greeting> {
        let number = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let (rank, size) = (number(8)? as usize, number(12)? as usize);
        let port = u16::try_from(number(16)?).ok()?;
        let greeting = Greeting { rank, size, port, machine: long(20)?, job: long(28)? };
        (bytes[..8] == MAGIC).then_some(greeting)
    }
}

impl Start {
    /// Reads the variables of `torchrun`.
    pub(super) fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Start, String> {
        let text = |name: &str| {
            let value = variable(name).filter(|value| !value.trim().is_empty());
            value.ok_or_else(|| format!("{name} is not set; start the processes by torchrun, mpirun or srun"))
        };
        let number = |name: &str| -> Result<usize, String> {
            let value = text(name)?;
            value.trim().parse().map_err(|_| format!("{name} is {value:?}, which is no number"))
        };
        let (rank, size, port) = (number("RANK")?, number("WORLD_SIZE")?, number("MASTER_PORT")?);
        if rank >= size || size > MOST {
            return Err(format!(
                "RANK is {rank} and WORLD_SIZE {size}; ranks are below the size, at most {MOST}"
            ));
        }
        let port = u16::try_from(port).ok().and_then(|port| port.checked_add(1));
        let port = port.ok_or("MASTER_PORT is above 65534; the port after it is used")?;
        let job =
            format!("{} {}", env!("CARGO_PKG_VERSION"), variable("TORCHELASTIC_RUN_ID").unwrap_or_default());
        Ok(Start { rank, size, address: text("MASTER_ADDR")?, port, job: hash(job.as_bytes()) })
    }

    /// Connects this process with all others before `deadline`. Returns the connections, by rank, and its place.
    pub(super) fn meet(&self, deadline: Instant) -> Result<(Vec<Option<TcpStream>>, Place), String> {
        let (machines, peers) = if self.rank == 0 { self.host(deadline)? } else { self.join(deadline)? };
        Ok((peers, place_of(self.rank, &machines)))
    }

    fn greeting(&self, port: u16) -> Greeting {
        let Start { rank, size, job, .. } = *self;
        Greeting { rank, size, port, machine: machine(), job }
    }

    fn empty(&self) -> Vec<Option<TcpStream>> {
        (0..self.size).map(|_| None).collect()
    }

    /// Waits for all others, and tells them their addresses.
    fn host(&self, deadline: Instant) -> Result<(Vec<u64>, Vec<Option<TcpStream>>), String> {
        let at = (self.address.as_str(), self.port);
        // Where the address is not one of this machine's, as behind a router, any of its addresses will do.
        let listener =
            TcpListener::bind(at).or_else(|_| TcpListener::bind((Ipv6Addr::UNSPECIFIED, self.port)));
        let listener = listener.or_else(|_| TcpListener::bind(("0.0.0.0", self.port)));
        let listener = listener.map_err(|error| {
            format!("rank 0: port {} of {}, after MASTER_PORT, cannot be used: {error}; choose another MASTER_PORT",
                self.port, self.address)
        })?;
        let mut peers = self.empty();
        let found = self.accept(&listener, 1..self.size, &mut peers, deadline)?;
        let own = machine();
        let mut table = vec![0; ADDRESS * self.size];
        let mut machines = vec![own; self.size];
        for (rank, (entry, peer)) in table.chunks_exact_mut(ADDRESS).zip(&peers).enumerate() {
            let (Some(peer), Some(greeting)) = (peer, &found[rank]) else { continue };
            let address = peer.peer_addr().map_err(|error| format!("rank {rank} has left: {error}"))?;
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            entry[..16].copy_from_slice(&ip.octets());
            entry[16..18].copy_from_slice(&greeting.port.to_le_bytes());
            machines[rank] = greeting.machine;
        }
        for (entry, machine) in table.chunks_exact_mut(ADDRESS).zip(&machines) {
            entry[20..].copy_from_slice(&machine.to_le_bytes());
        }
        for (rank, peer) in peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            peer.write_all(&table).map_err(|error| format!("rank {rank} has left: {error}"))?;
        }
        Ok((machines, peers))
    }

    /// Connects to the first process, then to those of lower rank, and waits for those of higher rank.
    fn join(&self, deadline: Instant) -> Result<(Vec<u64>, Vec<Option<TcpStream>>), String> {
        let Start { rank, size, address, port, .. } = self;
        let mut first = self.reach(deadline)?;
        let own = first.local_addr().map_err(|error| format!("rank {rank}: {error}"))?;
        let listener =
            TcpListener::bind((own.ip(), 0)).and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (own, listener) =
            listener.map_err(|error| format!("rank {rank}: no port can be opened: {error}"))?;
        let mut table = vec![0; ADDRESS * size];
        let told = first.write_all(&self.greeting(own.port()).bytes());
        let told = told.and_then(|()| first.set_read_timeout(Some(remaining(deadline))));
        told.and_then(|()| first.read_exact(&mut table)).map_err(|error| {
            format!("rank {rank}: rank 0 at {address}:{port} does not answer ({error}); see its message")
        })?;
        let entry = |other: usize| &table[ADDRESS * other..][..ADDRESS];
        let machines =
            (0..*size).map(|other| u64::from_le_bytes(entry(other)[20..].try_into().unwrap_or_default()));
        let machines: Vec<u64> = machines.collect();
        let mut peers = self.empty();
        peers[0] = Some(first);
        for (other, peer) in peers.iter_mut().enumerate().take(*rank).skip(1) {
            let ip: [u8; 16] = entry(other)[..16].try_into().unwrap_or_default();
            let ip = Ipv6Addr::from(ip).to_canonical();
            let port = u16::from_le_bytes([entry(other)[16], entry(other)[17]]);
            let connected = TcpStream::connect_timeout(&SocketAddr::new(ip, port), remaining(deadline));
            let connected = connected.and_then(|mut stream| {
                stream.write_all(&self.greeting(0).bytes())?;
                Ok(stream)
            });
            *peer = Some(
                connected.map_err(|error| format!("rank {rank}: rank {other} cannot be reached: {error}"))?,
            );
        }
        self.accept(&listener, *rank + 1..*size, &mut peers, deadline)?;
        Ok((machines, peers))
    }

    /// Connects to the first process, which may start later.
    fn reach(&self, deadline: Instant) -> Result<TcpStream, String> {
        let Start { rank, address, port, .. } = self;
        loop {
            match TcpStream::connect((address.as_str(), *port)) {
                Ok(stream) => return Ok(stream),
                Err(_) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                Err(error) => {
                    return Err(format!(
                        "rank {rank}: rank 0 cannot be reached at {address}:{port}, MASTER_ADDR and the port after \
                         MASTER_PORT: {error}"
                    ));
                }
            }
        }
    }

    /// Waits until the processes `ranks` have come. What is none of them is turned away.
    fn accept(
        &self,
        listener: &TcpListener,
        ranks: std::ops::Range<usize>,
        peers: &mut [Option<TcpStream>],
        deadline: Instant,
    ) -> Result<Vec<Option<Greeting>>, String> {
        let mut found: Vec<Option<Greeting>> = vec![None; self.size];
        let failed = |error: std::io::Error| format!("rank {}: no one can be waited for: {error}", self.rank);
        listener.set_nonblocking(true).map_err(failed)?;
        loop {
            let missing: Vec<String> =
                ranks.clone().filter(|&rank| peers[rank].is_none()).map(|rank| rank.to_string()).collect();
            if missing.is_empty() {
                return Ok(found);
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    let greeting = greeting_of(&stream, remaining(deadline).min(TO_GREET));
                    let ours = |greeting: &Greeting| {
                        let Greeting { rank, size, job, .. } = *greeting;
                        (size, job) == (self.size, self.job) && ranks.contains(&rank) && peers[rank].is_none()
                    };
                    if let Some(greeting) = greeting.filter(ours) {
                        found[greeting.rank] = Some(greeting);
                        peers[greeting.rank] = Some(stream);
                    }
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(failed(error)),
                Err(_) if Instant::now() > deadline => {
                    let (what, missing) =
                        (if missing.len() == 1 { "rank" } else { "ranks" }, missing.join(", "));
                    return Err(format!(
                        "rank {}: {what} {missing} did not come to {}:{} before the deadline",
                        self.rank, self.address, self.port
                    ));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }
}

/// The time before `deadline`; never 0, which would be no bound.
fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// Reads what a new connection says; none if it is no greeting.
fn greeting_of(mut stream: &TcpStream, within: Duration) -> Option<Greeting> {
    let mut bytes = [0; GREETING];
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(within)).ok()?;
    stream.read_exact(&mut bytes).ok()?;
    Greeting::read(&bytes)
}

/// A number of this machine: that of its start, or of its name.
fn machine() -> u64 {
    let files = ["/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/hostname", "/etc/hostname"];
    let text = files.iter().find_map(|file| std::fs::read(file).ok());
    hash(&text.unwrap_or_default())
}

/// FNV-1a.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The place of `rank`; machines are numbered in the order of their first processes.
fn place_of(rank: usize, machines: &[u64]) -> Place {
    let mut firsts: Vec<u64> = Vec::new();
    for machine in machines {
        if !firsts.contains(machine) {
            firsts.push(*machine);
        }
    }
    let own = machines[rank];
    let same = |machines: &[u64]| machines.iter().filter(|&&other| other == own).count();
    Place {
        machine: firsts.iter().position(|&other| other == own).unwrap_or_default(),
        machines: firsts.len(),
        local: same(&machines[..rank]),
        locals: same(machines),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Start, String> {
        Start::read(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn variables_say_where_to_meet() {
        let with = |rank, size, port| {
            read(&[("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "node-1"), ("MASTER_PORT", port)])
        };
        let start = with("2", "8", "29500").unwrap();
        assert_eq!((start.rank, start.size, &start.address[..], start.port), (2, 8, "node-1", 29501));
        for (start, part) in [
            (with("8", "8", "1"), "RANK is 8 and WORLD_SIZE 8"),
            (with("x", "8", "1"), "RANK is \"x\", which is no number"),
            (with("0", "1000000", "1"), "at most 65536"),
            (with("0", "8", "65535"), "MASTER_PORT is above 65534"),
            (with("0", "8", ""), "MASTER_PORT is not set; start the processes by torchrun"),
        ] {
            let error = start.unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn greetings_are_read_back_and_others_are_none() {
        let greeting = Greeting { rank: 3, size: 9, port: 4711, machine: 1 << 60, job: u64::MAX };
        assert_eq!(Greeting::read(&greeting.bytes()), Some(greeting));
        let mut other = greeting.bytes();
        other[0] = b'D';
        assert_eq!(Greeting::read(&other), None);
        let mut port = greeting.bytes();
        port[18] = 1;
        assert_eq!(Greeting::read(&port), None);
    }

    #[test]
    fn places_follow_the_machines() {
        let machines = [7, 7, 3, 3, 7];
        let place = |rank| place_of(rank, &machines);
        assert_eq!(place(4), Place { machine: 0, machines: 2, local: 2, locals: 3 });
        assert_eq!(place(3), Place { machine: 1, machines: 2, local: 1, locals: 2 });
    }
}
