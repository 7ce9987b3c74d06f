//! Stored files on the disk: uploads as they come in, and blocks of what is downloaded.
//!
//! The loop sends [`FileJob`]s and gets a [`FileDone`] for each that has something to say; this side runs on the files
//! thread, one job at a time, in order. An upload is written to `incoming/`, synced, and renamed to its place; what it
//! is called and who may have it is not known here.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use crate::change::FileId;
use crate::data;

/// An upload is synced whenever so much of it was written, so that the disk never has much of it to write at once: a sync
/// of the journal would have to wait for that.
const UNSYNCED_BYTES_MAX: u64 = 1024 * 1024;
/// Read at once to find out whether a stored file is whole.
const CHECK_BYTES: usize = 1024 * 1024;

/// An upload or a download in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransferId(pub u64);

/// What the loop wants done.
#[derive(Debug)]
pub enum FileJob {
    /// Append a block to an upload, which begins with its first one.
    Append(TransferId, Vec<u8>),
    /// Make the upload durable as this file.
    Store(TransferId, FileId),
    /// Forget the upload or the download.
    Forget(TransferId),
    /// Read a block of at most `bytes` from a file; it stays open for the transfer, whatever becomes of its name.
    Read {
        /// The download.
        transfer: TransferId,
        /// What is downloaded.
        file: FileId,
        /// Where the block starts.
        offset: u64,
        /// Its size.
        bytes: usize,
    },
    /// Remove a file that nobody lists.
    Remove(FileId),
}

/// What came of a [`FileJob`].
#[derive(Debug)]
pub enum FileDone {
    /// The block is written; its memory comes back, empty.
    Appended(TransferId, Vec<u8>),
    /// The upload is durable. The CRC-32C of its bytes comes with it.
    Stored(TransferId, u32),
    /// A block of a download.
    Block(TransferId, Vec<u8>),
    /// There is no room for the upload; it is forgotten.
    DiskFull(TransferId),
    /// There are too many open files for this one now; it is forgotten.
    Busy(TransferId),
    /// The upload or the download is forgotten, and nothing more comes of it.
    Forgotten(TransferId),
    /// A block could not be read.
    Unreadable(TransferId, io::Error),
}

/// The disk failed in a way that is not about one transfer: nothing can be promised any more.
#[derive(Debug)]
pub struct FileError {
    /// Where.
    pub path: PathBuf,
    /// What it said.
    pub error: io::Error,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.error)
    }
}

impl std::error::Error for FileError {}

/// An upload so far.
#[derive(Debug)]
struct Incoming {
    file: File,
    /// The CRC-32C of what was written.
    sum: u32,
    /// What was written since the last sync.
    unsynced: u64,
}

/// Does file jobs.
#[derive(Debug)]
pub struct FileStore {
    root: PathBuf,
    /// None for one that has failed: what still comes for it is for nothing.
    uploads: HashMap<TransferId, Option<Incoming>>,
    downloads: HashMap<TransferId, Arc<File>>,
    /// The download that was opened last, until that is told.
    opened: Option<(TransferId, Arc<File>)>,
    /// Directories whose own entry this process has synced.
    synced: HashSet<PathBuf>,
}

impl FileStore {
    /// The files under `root`; the directory and its `incoming/` exist.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root, uploads: HashMap::new(), downloads: HashMap::new(), opened: None, synced: HashSet::new() }
    }

    /// Removes what a crash left: unfinished uploads, and files that `is_known` does not know. Says how many.
    ///
    /// # Errors
    /// What the disk said.
    pub fn remove_strays(&self, is_known: impl Fn(FileId) -> bool) -> io::Result<usize> {
        let mut removed = 0;
        for upload in fs::read_dir(self.root.join("incoming"))? {
            fs::remove_file(upload?.path())?;
            removed += 1;
        }
        for stray in self.strays(is_known)? {
            fs::remove_file(stray)?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Moves files that `is_known` does not know to `aside`. Says how many.
    ///
    /// # Errors
    /// What the disk said.
    pub fn put_aside(&self, aside: &Path, is_known: impl Fn(FileId) -> bool) -> io::Result<usize> {
        let strays = self.strays(is_known)?;
        if !strays.is_empty() {
            DirBuilder::new().recursive(true).mode(0o700).create(aside)?;
        }
        for stray in &strays {
            fs::rename(stray, aside.join(stray.file_name().unwrap_or_default()))?;
        }
        Ok(strays.len())
    }

    /// Stored files that `is_known` does not know.
    fn strays(&self, is_known: impl Fn(FileId) -> bool) -> io::Result<Vec<PathBuf>> {
        let mut strays = Vec::new();
        for directory in fs::read_dir(&self.root)? {
            let directory = directory?;
            if directory.file_name() == "incoming" || !directory.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(directory.path())? {
                let file = file?;
                let id = file.file_name().to_str().and_then(|name| u64::from_str_radix(name, 16).ok());
                if id.is_some_and(|id| !is_known(FileId(id))) {
                    strays.push(file.path());
                }
            }
        }
        Ok(strays)
    }

    /// Where a file should be.
    #[must_use]
    pub fn place(&self, file: FileId) -> PathBuf {
        self.directory(file).join(format!("{:016x}", file.0))
    }

    /// True when there is any stored file.
    ///
    /// # Errors
    /// What the disk said.
    pub fn has_any(&self) -> io::Result<bool> {
        for directory in fs::read_dir(&self.root)? {
            let path = directory?.path();
            if path.is_dir() && !path.ends_with("incoming") && fs::read_dir(path)?.next().is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The download that the last job has opened, if it has.
    pub fn take_opened(&mut self) -> Option<(TransferId, Arc<File>)> {
        self.opened.take()
    }

    /// Does one job.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails for another reason than being full.
    pub fn run(&mut self, job: FileJob) -> Result<Option<FileDone>, FileError> {
        match job {
            FileJob::Append(transfer, mut block) => {
                let written = self.write_block(transfer, &block);
                block.clear();
                self.upload_done(transfer, written.map(|()| FileDone::Appended(transfer, block))).map(Some)
            }
            FileJob::Store(transfer, file) => {
                let stored = self.sync_and_rename(transfer, file);
                self.upload_done(transfer, stored.map(|sum| FileDone::Stored(transfer, sum))).map(Some)
            }
            FileJob::Forget(transfer) => {
                self.downloads.remove(&transfer);
                if self.uploads.remove(&transfer).is_some() {
                    remove(self.incoming(transfer))?;
                }
                Ok(Some(FileDone::Forgotten(transfer)))
            }
            FileJob::Read { transfer, file, offset, bytes } => {
                Ok(Some(match self.read(transfer, file, offset, bytes) {
                    Ok(block) => FileDone::Block(transfer, block),
                    Err(error) if is_busy(&error) => FileDone::Busy(transfer),
                    Err(error) => FileDone::Unreadable(transfer, error),
                }))
            }
            FileJob::Remove(file) => remove(self.place(file)).map(|()| None),
        }
    }

    fn upload_done(&mut self, transfer: TransferId, result: io::Result<FileDone>) -> Result<FileDone, FileError> {
        let error = match result {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        self.uploads.insert(transfer, None);
        remove(self.incoming(transfer))?;
        match error.kind() {
            _ if is_busy(&error) => Ok(FileDone::Busy(transfer)),
            // The file system, or the process, may not have files of that size.
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Ok(FileDone::DiskFull(transfer))
            }
            _ => Err(FileError { path: self.incoming(transfer), error }),
        }
    }

    fn write_block(&mut self, transfer: TransferId, block: &[u8]) -> io::Result<()> {
        if let Some(upload) = self.uploads.get_mut(&transfer) {
            return upload.as_mut().ok_or(ErrorKind::StorageFull)?.append(block);
        }
        let path = self.incoming(transfer);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut upload = Incoming { file, sum: 0, unsynced: 0 };
        upload.append(block)?;
        self.uploads.insert(transfer, Some(upload));
        Ok(())
    }

    /// Gives back the sum of the bytes.
    fn sync_and_rename(&mut self, transfer: TransferId, file: FileId) -> io::Result<u32> {
        let upload = self.uploads.get_mut(&transfer).ok_or(ErrorKind::NotFound)?;
        let upload = upload.as_mut().ok_or(ErrorKind::StorageFull)?;
        upload.file.sync_all()?;
        let sum = upload.sum;
        let place = self.place(file);
        let directory = self.directory(file);
        if !self.synced.contains(&directory) {
            DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
            data::sync(&self.root)?;
            self.synced.insert(directory.clone());
        }
        fs::rename(self.incoming(transfer), &place)?;
        self.uploads.remove(&transfer);
        if let Err(error) = data::sync(&directory) {
            // Nobody will be told of it, so it is nobody's.
            fs::remove_file(&place)?;
            return Err(error);
        }
        Ok(sum)
    }

    fn read(&mut self, transfer: TransferId, file: FileId, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        if !self.downloads.contains_key(&transfer) {
            let opened = Arc::new(File::open(self.place(file))?);
            // A hint, which a file system may not know.
            if let Err(error) = rustix::fs::fadvise(&*opened, 0, None, Advice::Sequential) {
                tracing::debug!(%error, "a file is read as if it were not read in order");
            }
            self.downloads.insert(transfer, Arc::clone(&opened));
            self.opened = Some((transfer, opened));
        }
        let download = self.downloads.get(&transfer).ok_or(ErrorKind::NotFound)?;
        let mut block = vec![0; bytes];
        download.read_exact_at(&mut block, offset)?;
        Ok(block)
    }

    fn incoming(&self, transfer: TransferId) -> PathBuf {
        self.root.join("incoming").join(format!("{:016x}", transfer.0))
    }

    fn directory(&self, file: FileId) -> PathBuf {
        self.root.join(format!("{:02x}", file.0 & 0xff))
    }
}

impl Incoming {
    fn append(&mut self, block: &[u8]) -> io::Result<()> {
        self.file.write_all(block)?;
        self.sum = crc32c::crc32c_append(self.sum, block);
        self.unsynced += block.len() as u64;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

/// Reads a whole file. Says how many bytes it has, and their CRC-32C.
///
/// # Errors
/// What the disk said.
pub fn sum(path: &Path) -> io::Result<(u64, u32)> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHECK_BYTES];
    let (mut bytes, mut sum) = (0, 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, sum)),
            Ok(count) => {
                bytes += count as u64;
                sum = crc32c::crc32c_append(sum, &buffer[..count]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads what the system has of a file in memory.
///
/// # Errors
/// [`ErrorKind::WouldBlock`] when it would have to be read from the disk, or when the file system cannot say.
pub fn read_cached(file: &File, offset: u64, into: &mut [u8]) -> io::Result<usize> {
    match rustix::io::preadv2(file, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(ErrorKind::WouldBlock.into()),
        read => Ok(read?),
    }
}

/// There are too many open files, for now.
pub(crate) fn is_busy(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::MFILE | Errno::NFILE))
}

fn remove(path: PathBuf) -> Result<(), FileError> {
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(FileError { path, error }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, FileStore) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("incoming")).unwrap();
        let store = FileStore::new(directory.path().to_owned());
        (directory, store)
    }

    fn upload(store: &mut FileStore, transfer: u64, file: u64, blocks: &[&[u8]]) {
        for block in blocks {
            let done = store.run(FileJob::Append(TransferId(transfer), block.to_vec())).unwrap();
            assert!(matches!(done, Some(FileDone::Appended(_, spare)) if spare.is_empty()));
        }
        let done = store.run(FileJob::Store(TransferId(transfer), FileId(file))).unwrap();
        let sum = crc32c::crc32c(&blocks.concat());
        assert!(matches!(done, Some(FileDone::Stored(_, known)) if known == sum));
    }

    fn read(store: &mut FileStore, transfer: u64, file: u64, offset: u64, bytes: usize) -> Option<Vec<u8>> {
        let transfer = TransferId(transfer);
        match store.run(FileJob::Read { transfer, file: FileId(file), offset, bytes }).unwrap() {
            Some(FileDone::Block(_, block)) => Some(block),
            _ => None,
        }
    }

    #[test]
    fn an_upload_is_read_back_in_blocks() {
        let (_directory, mut store) = store();
        upload(&mut store, 1, 9, &[b"abc", b"def"]);
        assert_eq!(read(&mut store, 2, 9, 0, 4).unwrap(), b"abcd");
        assert_eq!(read(&mut store, 2, 9, 4, 2).unwrap(), b"ef");
        assert_eq!(read(&mut store, 2, 9, 4, 3), None, "a file that is shorter than it was is not given as whole");
    }

    #[test]
    fn what_is_in_memory_is_read_without_waiting_and_what_is_not_may_not_be() {
        let (directory, _) = store();
        let path = directory.path().join("file");
        fs::write(&path, [7; 100_000]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        // Where the system follows this advice, nothing of it is in memory then.
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let mut block = [0; 50_000];
        match read_cached(&file, 0, &mut block) {
            Ok(count) => assert!(block[..count].iter().all(|byte| *byte == 7)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        file.read_exact_at(&mut [0; 100_000], 0).unwrap();
        match read_cached(&file, 60_000, &mut block) {
            Ok(count) => assert_eq!((count, block[39_999]), (40_000, 7)),
            // A file system may not know how to say.
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    #[test]
    fn a_file_that_is_removed_during_a_download_is_delivered_whole() {
        let (_directory, mut store) = store();
        upload(&mut store, 1, 9, &[b"abcdef"]);
        assert_eq!(read(&mut store, 2, 9, 0, 3).unwrap(), b"abc");
        assert!(store.run(FileJob::Remove(FileId(9))).unwrap().is_none());
        assert_eq!(read(&mut store, 2, 9, 3, 3).unwrap(), b"def");
        assert!(matches!(store.run(FileJob::Forget(TransferId(2))).unwrap(), Some(FileDone::Forgotten(_))));
        assert_eq!(read(&mut store, 3, 9, 0, 3), None);
    }

    #[test]
    fn strays_are_removed_and_what_is_known_is_kept() {
        let (directory, mut store) = store();
        upload(&mut store, 1, 1, &[b"kept"]);
        upload(&mut store, 2, 2, &[b"stray"]);
        store.run(FileJob::Append(TransferId(3), b"unfinished".to_vec())).unwrap();
        let again = FileStore::new(directory.path().to_owned());
        assert_eq!(again.remove_strays(|file| file == FileId(1)).unwrap(), 2);
        assert_eq!(read(&mut store, 4, 1, 0, 4).unwrap(), b"kept");
        assert_eq!(fs::read_dir(directory.path().join("incoming")).unwrap().count(), 0);
    }
}
