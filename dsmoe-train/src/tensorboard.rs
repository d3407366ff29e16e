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
        let seconds = wall_time() as u64;
        let (mut attempt, mut path) =
            (seconds, dir.join(format!("events.out.tfevents.{seconds:010}.{host}")));
        let file = loop {
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break file,
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists && attempt < seconds + 1000 => {
                    attempt += 1;
                    path = dir.join(format!("events.out.tfevents.{attempt:010}.{host}"));
                }
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

    #[derive(Debug)]
    enum Value {
        Number(u64),
        Bytes(Vec<u8>),
    }

    /// Decodes any protobuf message to (field, value).
    fn message(mut data: &[u8]) -> Vec<(u64, Value)> {
        fn number(data: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        }
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = number(&mut data);
            let value = match key & 7 {
                0 => Value::Number(number(&mut data)),
                1 => {
                    let (head, rest) = data.split_at(8);
                    data = rest;
                    Value::Number(u64::from_le_bytes(head.try_into().unwrap()))
                }
                2 => {
                    let len = number(&mut data) as usize;
                    let (head, rest) = data.split_at(len);
                    data = rest;
                    Value::Bytes(head.to_vec())
                }
                5 => {
                    let (head, rest) = data.split_at(4);
                    data = rest;
                    Value::Number(u64::from(u32::from_le_bytes(head.try_into().unwrap())))
                }
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    fn records(dir: &Path) -> Vec<Vec<(u64, Value)>> {
        let path = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
        let data = std::fs::read(path).unwrap();
        let mut data = &data[..];
        let mut records = Vec::new();
        while !data.is_empty() {
            let len = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
            for (part, crc) in [(&data[..8], &data[8..12]), (&data[12..12 + len], &data[12 + len..16 + len])]
            {
                let rotated =
                    u32::from_le_bytes(crc.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15);
                assert_eq!(rotated, crc_by_definition(part));
            }
            records.push(message(&data[12..12 + len]));
            data = &data[16 + len..];
        }
        records
    }

    #[test]
    fn another_reader_understands_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), None).unwrap();
        writer.scalars(300, &[("train/loss", 2.5), ("train/learning_rate", 1e-4)]).unwrap();
        let records = records(dir.path());
        assert_eq!(records.len(), 2);
        let [(1, Value::Number(time)), (2, Value::Number(0)), (3, Value::Bytes(version))] = &records[0][..]
        else {
            panic!("{:?}", records[0]);
        };
        assert!(f64::from_bits(*time) > 1.6e9);
        assert_eq!(version, b"brain.Event:2");
        let [_, (2, Value::Number(300)), (5, Value::Bytes(summary))] = &records[1][..] else {
            panic!("{:?}", records[1]);
        };
        let values: Vec<(String, f32)> = message(summary)
            .into_iter()
            .map(|(_, value)| {
                let Value::Bytes(value) = value else { panic!("{value:?}") };
                let fields = message(&value);
                let [(1, Value::Bytes(tag)), (2, Value::Number(bits))] = &fields[..] else {
                    panic!("{fields:?}")
                };
                (String::from_utf8(tag.clone()).unwrap(), f32::from_bits(*bits as u32))
            })
            .collect();
        assert_eq!(values, [("train/loss".to_owned(), 2.5), ("train/learning_rate".to_owned(), 1e-4)]);
    }

    #[test]
    fn a_resumed_file_purges_what_came_after() {
        let dir = tempfile::tempdir().unwrap();
        EventWriter::create(dir.path(), Some(20)).unwrap();
        let records = records(dir.path());
        let [_, (2, Value::Number(21)), (7, Value::Bytes(log))] = &records[1][..] else {
            panic!("{:?}", records[1]);
        };
        assert!(matches!(message(log)[..], [(1, Value::Number(1))]));
    }

    #[test]
    fn two_files_of_one_second_have_two_names() {
        let dir = tempfile::tempdir().unwrap();
        EventWriter::create(dir.path(), None).unwrap();
        EventWriter::create(dir.path(), None).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
