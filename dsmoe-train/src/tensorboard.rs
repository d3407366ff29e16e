//! TensorBoard event files: scalars as length-framed records with masked CRC-32C.
//!
//! ```text
//! record   u64 length LE, masked crc of those 8 bytes, payload, masked crc of the payload
//! mask     rotate right 15, + 0xa282ead8
//! Event    1 wall_time double, 2 step int64, 3 file_version string, 5 summary, 7 session_log
//! Summary  1 value (repeated): 1 tag string, 2 simple_value float
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// Protobuf wire types.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

/// One open event file. Every call writes whole records to the operating system.
///
/// ```
/// use dsmoe_train::tensorboard::EventWriter;
///
/// let work = tempfile::tempdir()?;
/// let mut writer = EventWriter::create(work.path(), None)?;
/// writer.scalars(1, &[("train/loss", 3.5)])?;
/// assert_eq!(std::fs::read_dir(work.path())?.count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new event file in `dir`, which must exist. A run resumed from `resumed_at` makes TensorBoard drop what
    /// older files in `dir` say about later steps.
    ///
    /// # Errors
    /// The file cannot be created or written.
    pub fn create(dir: &Path, resumed_at: Option<u64>) -> Result<EventWriter> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String = host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let host = if host.is_empty() { "localhost".to_owned() } else { host };
        let mut seconds = wall_time() as u64;
        let last = seconds + 1000;
        let (file, path) = loop {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.{host}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (file, path),
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists && seconds < last => seconds += 1,
                Err(cause) => return Err(Error::io(&path)(cause)),
            }
        };
        let mut writer = EventWriter { file, path };
        let mut version = event(wall_time(), 0);
        bytes(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        if let Some(step) = resumed_at {
            // SessionLog { status: START }
            let mut start = event(wall_time(), step + 1);
            bytes(&mut start, 7, &[1 << 3 | VARINT, 1]);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    /// Writes one event with these scalars.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | FIXED32);
            entry.extend_from_slice(&(*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        let mut payload = event(wall_time(), step);
        bytes(&mut payload, 5, &summary);
        self.record(&payload)
    }

    fn record(&mut self, payload: &[u8]) -> Result<()> {
        let len = (payload.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(payload.len() + 16);
        record.extend_from_slice(&len);
        record.extend_from_slice(&masked_crc(&len).to_le_bytes());
        record.extend_from_slice(payload);
        record.extend_from_slice(&masked_crc(payload).to_le_bytes());
        self.file.write_all(&record).map_err(Error::io(&self.path))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut out = vec![1 << 3 | FIXED64];
    out.extend_from_slice(&wall_time.to_le_bytes());
    out.push(2 << 3 | VARINT);
    varint(&mut out, step);
    out
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | BYTES);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bitwise CRC-32C from its polynomial, for checking only.
    fn crc_by_definition(data: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1));
            }
        }
        !crc
    }

    /// The wall time of each record in the file, and the rest of its payload; checks the frames.
    fn records(dir: &Path) -> Vec<(f64, Vec<u8>)> {
        let path = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
        let data = std::fs::read(path).unwrap();
        let mut data = &data[..];
        let mut records = Vec::new();
        while !data.is_empty() {
            let len = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
            for part in [0..8, 12..12 + len] {
                let crc = u32::from_le_bytes(data[part.end..part.end + 4].try_into().unwrap());
                assert_eq!(crc.wrapping_sub(0xa282_ead8).rotate_left(15), crc_by_definition(&data[part]));
            }
            assert_eq!(data[12], 1 << 3 | FIXED64);
            let time = f64::from_le_bytes(data[13..21].try_into().unwrap());
            records.push((time, data[21..12 + len].to_vec()));
            data = &data[16 + len..];
        }
        records
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), None).unwrap();
        writer.scalars(300, &[("train/loss", 2.5), ("train/learning_rate", 1e-4)]).unwrap();
        let [(time, version), (_, scalars)] = &records(dir.path())[..] else { panic!("two records") };
        assert!(*time > 1.6e9);
        assert_eq!(version[..], *b"\x10\0\x1a\x0dbrain.Event:2");
        // Step 300; a summary of 47 bytes; two values of 17 and 26 bytes, each with its tag and number.
        let [loss, rate] = [2.5f32, 1e-4].map(f32::to_le_bytes);
        let (loss, rate) =
            ([&b"train/loss\x15"[..], &loss].concat(), [&b"train/learning_rate\x15"[..], &rate].concat());
        let head = &b"\x10\xac\x02\x2a\x2f\x0a\x11\x0a\x0a"[..];
        assert_eq!(scalars[..], [head, &loss, b"\x0a\x1a\x0a\x13", &rate].concat());
    }

    #[test]
    fn a_resumed_file_purges_what_came_after() {
        let dir = tempfile::tempdir().unwrap();
        EventWriter::create(dir.path(), Some(20)).unwrap();
        // Step 21; a session log of 2 bytes whose status is START.
        assert_eq!(records(dir.path())[1].1, b"\x10\x15\x3a\x02\x08\x01");
    }

    #[test]
    fn two_files_of_one_second_have_two_names() {
        let dir = tempfile::tempdir().unwrap();
        EventWriter::create(dir.path(), None).unwrap();
        EventWriter::create(dir.path(), None).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
