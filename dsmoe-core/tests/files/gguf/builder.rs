//! GGUF files byte by byte, for files that are wrong on purpose.

/// A file in the making.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) keys: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A key with a value of type `kind`.
pub(crate) fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name)[..], &kind.to_le_bytes(), value].concat()
}

pub(crate) fn text_key(name: &str, value: &str) -> Vec<u8> {
    key(name, 8, &text(value))
}

pub(crate) fn u32_key(name: &str, value: u32) -> Vec<u8> {
    key(name, 4, &value.to_le_bytes())
}

/// A list of elements of type `kind`.
pub(crate) fn list_key(name: &str, kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    let count = elements.len() as u64;
    key(name, 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), &elements.concat()].concat())
}

/// A tensor with dimensions in the order of the file.
pub(crate) fn tensor(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name);
    out.extend((dimensions.len() as u32).to_le_bytes());
    dimensions.iter().for_each(|n| out.extend(n.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

impl Gguf {
    /// One tensor of 64 f32s, and an architecture.
    pub(crate) fn small() -> Gguf {
        Gguf {
            version: 3,
            keys: vec![text_key("general.architecture", "llama")],
            tensors: vec![tensor("output_norm.weight", &[64], 0, 0)],
            data: vec![0; 256],
        }
    }

    pub(crate) fn with_key(mut self, key: Vec<u8>) -> Gguf {
        self.keys.push(key);
        self
    }

    pub(crate) fn with_tensor(mut self, tensor: Vec<u8>) -> Gguf {
        self.tensors = vec![tensor];
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}
