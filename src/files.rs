//! Stored files on the disk: uploads as they come in, and blocks of what is downloaded.
//!
//! The loop sends [`FileJob`]s and gets a [`FileDone`] for each that has something to say; this side runs on the files
//! thread, one job at a time, in order. An upload is written to `incoming/`, synced, and renamed to its place; what it
//! is called and who may have it is not known here.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use rustix::io::Errno;

use crate::change::FileId;
use crate::disk::{Directory, Entry, FileRef, Mode, is_full, read_exact_at, read_full_at, write_all_at};

/// An upload is synced whenever so much of it was written, so that the disk never has much of it to write at once: a sync
/// of the journal would have to wait for that.
const UNSYNCED_BYTES_MAX: u64 = 1024 * 1024;
/// Read at once to find out whether a stored file is whole.
const CHECK_BYTES: usize = 1024 * 1024;
/// Where uploads stand that are coming in.
const INCOMING: &str = "incoming";

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
    file: FileRef,
    /// How much was written.
    bytes: u64,
    /// The CRC-32C of what was.
    sum: u32,
    /// What was written since the last sync.
    unsynced: u64,
}

/// Does file jobs.
#[derive(Debug)]
pub struct FileStore {
    root: Directory,
    /// None for one that has failed: what still comes for it is for nothing.
    uploads: HashMap<TransferId, Option<Incoming>>,
    downloads: HashMap<TransferId, FileRef>,
    /// The download that was opened last, until that is told.
    opened: Option<(TransferId, FileRef)>,
    /// Directories that this process knows to be there, durably.
    made: BTreeSet<String>,
}

impl FileStore {
    /// The files under `root`; the directory and its `incoming/` exist.
    #[must_use]
    pub fn new(root: Directory) -> Self {
        Self { root, uploads: HashMap::new(), downloads: HashMap::new(), opened: None, made: BTreeSet::new() }
    }

    /// Removes what a crash left: unfinished uploads, and files that `is_known` does not know. Says how many.
    ///
    /// # Errors
    /// What the disk said.
    pub fn remove_strays(&self, is_known: impl Fn(FileId) -> bool) -> io::Result<usize> {
        let mut removed = 0;
        let incoming = self.incoming();
        for upload in incoming.list()?.into_iter().filter(|entry| !entry.is_directory) {
            incoming.remove(&upload.name)?;
            removed += 1;
        }
        for (directory, name) in self.strays(is_known)? {
            directory.remove(&name)?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Moves files that `is_known` does not know to `aside`, durably: the next start would remove them. Says how many.
    ///
    /// # Errors
    /// What the disk said.
    pub fn put_aside(&self, aside: &Directory, is_known: impl Fn(FileId) -> bool) -> io::Result<usize> {
        let strays = self.strays(is_known)?;
        if strays.is_empty() {
            return Ok(0);
        }
        aside.make()?;
        for (directory, name) in &strays {
            directory.rename_into(name, aside, name)?;
        }
        aside.sync()?;
        Ok(strays.len())
    }

    /// Stored files that `is_known` does not know: where, and by what name.
    fn strays(&self, is_known: impl Fn(FileId) -> bool) -> io::Result<Vec<(Directory, String)>> {
        let mut strays = Vec::new();
        for (directory, name) in self.stored()? {
            if id_of(&name).is_some_and(|id| !is_known(id)) {
                strays.push((directory, name));
            }
        }
        Ok(strays)
    }

    /// Every stored file.
    fn stored(&self) -> io::Result<Vec<(Directory, String)>> {
        let mut stored = Vec::new();
        for entry in self.root.list()?.into_iter().filter(|entry| entry.is_directory && entry.name != INCOMING) {
            let directory = self.root.child(&entry.name);
            // What is called otherwise, or stands elsewhere, is none of ours.
            let is_ours = |file: &Entry| {
                !file.is_directory && id_of(&file.name).is_some_and(|id| directory_name(id) == entry.name)
            };
            let files = directory.list()?.into_iter().filter(is_ours);
            stored.extend(files.map(|file| (directory.clone(), file.name)));
        }
        Ok(stored)
    }

    /// Where a file should be.
    #[must_use]
    pub fn place(&self, file: FileId) -> PathBuf {
        self.directory(file).join(&name(file))
    }

    /// How long a stored file is.
    ///
    /// # Errors
    /// What the disk said.
    pub fn bytes(&self, file: FileId) -> io::Result<u64> {
        Ok(self.directory(file).status(&name(file))?.bytes)
    }

    /// Reads a whole file. Says how many bytes it has, and their CRC-32C.
    ///
    /// # Errors
    /// What the disk said.
    pub fn sum(&self, file: FileId) -> io::Result<(u64, u32)> {
        let file = self.directory(file).open(&name(file), Mode::Read)?;
        let mut buffer = vec![0; CHECK_BYTES];
        let (mut bytes, mut sum) = (0, 0);
        loop {
            let count = read_full_at(&*file, &mut buffer, bytes)?;
            bytes += count as u64;
            sum = crc32c::crc32c_append(sum, &buffer[..count]);
            if count < buffer.len() {
                return Ok((bytes, sum));
            }
        }
    }

    /// The highest number that a stored file has, whoever knows of it.
    ///
    /// # Errors
    /// What the disk said.
    pub fn highest(&self) -> io::Result<Option<FileId>> {
        Ok(self.stored()?.into_iter().filter_map(|(_, name)| id_of(&name)).max())
    }

    /// True when there is any stored file.
    ///
    /// # Errors
    /// What the disk said.
    pub fn has_any(&self) -> io::Result<bool> {
        Ok(!self.stored()?.is_empty())
    }

    /// The download that the last job has opened, if it has.
    pub fn take_opened(&mut self) -> Option<(TransferId, FileRef)> {
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
                    self.remove_upload(transfer)?;
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
            FileJob::Remove(file) => {
                let removed = self.directory(file).remove(&name(file));
                removed.map(|()| None).map_err(|error| FileError { path: self.place(file), error })
            }
        }
    }

    fn upload_done(&mut self, transfer: TransferId, result: io::Result<FileDone>) -> Result<FileDone, FileError> {
        let error = match result {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        self.uploads.insert(transfer, None);
        self.remove_upload(transfer)?;
        match error.kind() {
            _ if is_busy(&error) => Ok(FileDone::Busy(transfer)),
            _ if is_full(&error) => Ok(FileDone::DiskFull(transfer)),
            // The file system, or the process, may not have files of that size.
            ErrorKind::FileTooLarge => Ok(FileDone::DiskFull(transfer)),
            _ => Err(FileError { path: self.incoming().join(&upload_name(transfer)), error }),
        }
    }

    fn remove_upload(&self, transfer: TransferId) -> Result<(), FileError> {
        let (incoming, name) = (self.incoming(), upload_name(transfer));
        incoming.remove(&name).map_err(|error| FileError { path: incoming.join(&name), error })
    }

    fn write_block(&mut self, transfer: TransferId, block: &[u8]) -> io::Result<()> {
        if let Some(upload) = self.uploads.get_mut(&transfer) {
            return upload.as_mut().ok_or(ErrorKind::StorageFull)?.append(block);
        }
        let file = self.incoming().open(&upload_name(transfer), Mode::CreateNew)?;
        let mut upload = Incoming { file, bytes: 0, sum: 0, unsynced: 0 };
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
        let directory = self.directory(file);
        if !self.made.contains(&directory_name(file)) {
            directory.make()?;
            // It may be there already, made by a try whose sync failed.
            self.root.sync()?;
            self.made.insert(directory_name(file));
        }
        self.incoming().rename_into(&upload_name(transfer), &directory, &name(file))?;
        self.uploads.remove(&transfer);
        if let Err(error) = directory.sync() {
            // Nobody will be told of it, so it is nobody's.
            directory.remove(&name(file))?;
            return Err(error);
        }
        Ok(sum)
    }

    fn read(&mut self, transfer: TransferId, file: FileId, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        if !self.downloads.contains_key(&transfer) {
            let opened = self.directory(file).open(&name(file), Mode::Read)?;
            opened.will_read_in_order();
            self.downloads.insert(transfer, FileRef::clone(&opened));
            self.opened = Some((transfer, opened));
        }
        let download = self.downloads.get(&transfer).ok_or(ErrorKind::NotFound)?;
        let mut block = vec![0; bytes];
        read_exact_at(&**download, &mut block, offset)?;
        Ok(block)
    }

    fn incoming(&self) -> Directory {
        self.root.child(INCOMING)
    }

    fn directory(&self, file: FileId) -> Directory {
        self.root.child(&directory_name(file))
    }
}

fn name(file: FileId) -> String {
    format!("{:016x}", file.0)
}

/// Which file has this name; none for what is called otherwise.
fn id_of(written: &str) -> Option<FileId> {
    let id = FileId(u64::from_str_radix(written, 16).ok()?);
    (name(id) == written && id.0 < u64::MAX / 2).then_some(id)
}

fn directory_name(file: FileId) -> String {
    format!("{:02x}", file.0 & 0xff)
}

fn upload_name(transfer: TransferId) -> String {
    format!("{:016x}", transfer.0)
}

impl Incoming {
    fn append(&mut self, block: &[u8]) -> io::Result<()> {
        write_all_at(&*self.file, block, self.bytes)?;
        self.bytes += block.len() as u64;
        self.sum = crc32c::crc32c_append(self.sum, block);
        self.unsynced += block.len() as u64;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

/// There are too many open files, for now.
pub(crate) fn is_busy(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::MFILE | Errno::NFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, FileStore) {
        let directory = tempfile::tempdir().unwrap();
        let root = Directory::on_system(directory.path());
        root.child(INCOMING).make().unwrap();
        let store = FileStore::new(root);
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
        let again = FileStore::new(Directory::on_system(directory.path()));
        assert_eq!(again.remove_strays(|file| file == FileId(1)).unwrap(), 2);
        assert_eq!(read(&mut store, 4, 1, 0, 4).unwrap(), b"kept");
        assert_eq!(again.incoming().list().unwrap(), []);
    }
}
