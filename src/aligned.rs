//! Memory at an address that direct I/O accepts.

/// What direct I/O reads and writes is a whole number of these, in memory and on the disk.
pub const BLOCK_BYTES: usize = 4096;

/// Zeroed memory that starts at a block's boundary and never moves.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl AlignedBuffer {
    /// So many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES).min(BLOCK_BYTES);
        Self { memory, start, bytes }
    }

    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }

    /// All of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_at_a_boundary_and_has_its_size() {
        for bytes in [0, 1, BLOCK_BYTES, 10 * BLOCK_BYTES] {
            let mut buffer = AlignedBuffer::new(bytes);
            assert_eq!(buffer.bytes().as_ptr() as usize % BLOCK_BYTES, 0);
            assert_eq!(buffer.bytes_mut().len(), bytes);
        }
    }
}
