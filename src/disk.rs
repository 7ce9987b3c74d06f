//! The one seam to the file system: what the durable part of the server asks of a disk, and the real disk behind it.
//!
//! Everything that must survive a power cut goes through [`Disk`] and [`DiskFile`], so that a test can put a disk under the
//! real code that forgets, tears and reorders whatever was not synced. Nothing crosses it once a message: a call is a whole
//! write, a whole read, or a change of names.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, IoSliceMut, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, OFlags, fallocate};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use crate::aligned::BLOCK_BYTES;

/// A disk, for everybody who works on it.
pub type DiskRef = Arc<dyn Disk>;
/// An open file, for everybody who reads or writes it.
pub type FileRef = Arc<dyn DiskFile>;

/// A write that comes to less than a block is tried again so often.
const WRITE_TRIES_MAX: u32 = 64;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To read what is there.
    Read,
    /// To write over what is there, through the page cache; durable after a sync.
    Write,
    /// To write over what is there, past the page cache, durable when a write returns (`O_DIRECT`, `O_DSYNC`).
    WriteDurable,
    /// A new file in the place of whatever is there, through the page cache.
    Create,
    /// The same past the page cache; durable after a sync (`O_DIRECT`).
    CreateDirect,
    /// A file that must not be there yet, through the page cache.
    CreateNew,
}

/// What a directory holds under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: String,
    /// It is a directory itself.
    pub is_directory: bool,
}

/// What is known of a file or a directory without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its size.
    pub bytes: u64,
    /// How many names it has.
    pub links: u64,
    /// It is a directory.
    pub is_directory: bool,
    /// No other file has the same one at the same time: the device and the inode.
    pub identity: (u64, u64),
}

/// What is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOf {
    /// A directory that is there.
    Directory,
    /// A file, which is made if it is missing, and then holds the process id of its owner.
    FileMade,
    /// A file that is there; nothing of it changes.
    File,
}

/// What came of trying to take a lock.
#[derive(Debug)]
pub enum Locked {
    /// It is held until this is dropped.
    Held(Box<dyn Lock>),
    /// Another process has it; its id, if it is known.
    Taken(Option<u32>),
}

/// A lock that is held until it is dropped.
pub trait Lock: fmt::Debug + Send + Sync {}

/// A disk, by paths. Names with bytes that are not UTF-8 do not exist for it.
///
/// # Errors
/// Those of the system call that each method is named after.
#[allow(clippy::missing_errors_doc)]
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens or makes a file, readable and writable by its owner alone.
    fn open(&self, path: &Path, mode: Mode) -> io::Result<FileRef>;
    /// Makes a directory with mode 0700; it is an error if there is something.
    fn make_directory(&self, path: &Path) -> io::Result<()>;
    /// What is in a directory, in any order.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;
    /// What is known of a file or a directory.
    fn status(&self, path: &Path) -> io::Result<Status>;
    /// Gives a file or a directory another name; what had that name goes.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name, which must be free.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name of a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory that is empty.
    fn remove_directory(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
    /// How much room there is where a directory is.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Tries to take a lock.
    fn lock(&self, path: &Path, of: LockOf) -> io::Result<Locked>;
}

/// An open file.
///
/// # Errors
/// Those of the system call that each method is named after.
#[allow(clippy::missing_errors_doc)]
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Reads at a position: less than asked for at the end of the file, and perhaps elsewhere.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
    /// The same for what is in memory; [`ErrorKind::WouldBlock`] when the disk must be waited for, or when it cannot say.
    fn read_cached_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes at a position: perhaps less than was given.
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize>;
    /// Sets so many bytes aside, which read as zeros; false where the file system does not do that.
    fn allocate(&self, bytes: u64) -> io::Result<bool>;
    /// Cuts the file off, or lengthens it with zeros.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// Makes what was written durable, and its size.
    fn sync_data(&self) -> io::Result<()>;
    /// The same with all that is known of the file.
    fn sync_all(&self) -> io::Result<()>;
    /// Its size.
    fn bytes(&self) -> io::Result<u64>;
    /// Says that it will be read from its beginning to its end: a hint.
    fn will_read_in_order(&self);
}

/// Reads to the end of `into`.
///
/// # Errors
/// What the disk said; [`ErrorKind::UnexpectedEof`] when the file ends before.
pub fn read_exact_at(file: &dyn DiskFile, into: &mut [u8], offset: u64) -> io::Result<()> {
    match read_full_at(file, into, offset)? {
        count if count == into.len() => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads to the end of `into`, or of the file. Says how much.
///
/// # Errors
/// What the disk said.
pub fn read_full_at(file: &dyn DiskFile, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match file.read_at(&mut into[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes all of `from`.
///
/// A write that came to less goes on at a whole block, as direct I/O has to: what is written twice is the same.
///
/// # Errors
/// What the disk said. How much of it was written is not known then.
pub fn write_all_at(file: &dyn DiskFile, from: &[u8], offset: u64) -> io::Result<()> {
    let (mut done, mut tries_left) = (0, WRITE_TRIES_MAX);
    while done < from.len() {
        let count = match file.write_at(&from[done..], offset + done as u64) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let is_rest = done + count == from.len();
        let whole = if is_rest { count } else { count - count % BLOCK_BYTES };
        if whole == 0 {
            tries_left -= 1;
            if tries_left == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
        }
        done += whole;
    }
    Ok(())
}

/// A file from a position on, as a stream.
#[derive(Debug)]
pub struct Reader {
    file: FileRef,
    at: u64,
}

impl Reader {
    /// From `at` on.
    #[must_use]
    pub fn new(file: FileRef, at: u64) -> Self {
        Self { file, at }
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(into, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A file that is written from its beginning to its end.
#[derive(Debug)]
pub struct Writer {
    file: FileRef,
    at: u64,
}

impl Writer {
    /// Of a file that is empty.
    #[must_use]
    pub fn new(file: FileRef) -> Self {
        Self { file, at: 0 }
    }
}

impl Write for Writer {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(from, self.at)?;
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A directory on a disk.
#[derive(Clone, Debug)]
pub struct Directory {
    disk: DiskRef,
    path: PathBuf,
}

/// Names are those of files in it.
#[allow(clippy::missing_errors_doc)]
impl Directory {
    /// The directory at `path`, which need not be there.
    #[must_use]
    pub fn new(disk: DiskRef, path: PathBuf) -> Self {
        Self { disk, path }
    }

    /// One on the disk of this machine.
    #[must_use]
    pub fn on_system(path: &Path) -> Self {
        Self::new(system(), path.to_owned())
    }

    /// The disk that it is on.
    #[must_use]
    pub fn disk(&self) -> &DiskRef {
        &self.disk
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where one of its files is.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A directory in it.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { disk: Arc::clone(&self.disk), path: self.join(name) }
    }

    /// Opens one of its files.
    pub fn open(&self, name: &str, mode: Mode) -> io::Result<FileRef> {
        self.disk.open(&self.join(name), mode)
    }

    /// The whole of a file.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        Reader::new(self.open(name, Mode::Read)?, 0).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The first bytes of a file, at most so many.
    pub fn read_start(&self, name: &str, bytes: usize) -> io::Result<Vec<u8>> {
        let mut start = vec![0; bytes];
        let count = read_full_at(&*self.open(name, Mode::Read)?, &mut start, 0)?;
        start.truncate(count);
        Ok(start)
    }

    /// What is in it, in the order of names.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let mut entries = self.disk.list(&self.path)?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// What is known of one of its files.
    pub fn status(&self, name: &str) -> io::Result<Status> {
        self.disk.status(&self.join(name))
    }

    /// True when there is something of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.status(name).is_ok()
    }

    /// True when it is there itself.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.disk.status(&self.path).is_ok_and(|status| status.is_directory)
    }

    /// True when it is there as a directory of its own, and not by a link from elsewhere.
    #[must_use]
    pub fn is_no_link(&self) -> bool {
        let name = self.path.file_name().and_then(|name| name.to_str());
        let entries = self.parent().and_then(|parent| parent.list().ok()).unwrap_or_default();
        entries.iter().any(|entry| entry.is_directory && Some(entry.name.as_str()) == name)
    }

    /// Gives a file another name in it.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(&self.join(from), &self.join(to))
    }

    /// Gives a file a name in another directory of the same disk.
    pub fn rename_into(&self, from: &str, other: &Self, to: &str) -> io::Result<()> {
        self.disk.rename(&self.join(from), &other.join(to))
    }

    /// Gives a file a second name, in another directory or in the same.
    pub fn link_into(&self, from: &str, other: &Self, to: &str) -> io::Result<()> {
        self.disk.link(&self.join(from), &other.join(to))
    }

    /// The same, or a synced copy where the file system has no links, or not to there. Says how many bytes were copied.
    pub fn link_or_copy_into(&self, from: &str, other: &Self, to: &str) -> io::Result<Option<u64>> {
        match self.link_into(from, other, to) {
            Ok(()) => Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => Err(error),
            Err(_) => other.write_new(to, Reader::new(self.open(from, Mode::Read)?, 0)).map(Some),
        }
    }

    /// Writes a file that is not there yet, and syncs it. Says how many bytes it has.
    pub fn write_new(&self, name: &str, mut from: impl Read) -> io::Result<u64> {
        let file = self.open(name, Mode::CreateNew)?;
        let bytes = io::copy(&mut from, &mut Writer::new(FileRef::clone(&file)))?;
        file.sync_all()?;
        Ok(bytes)
    }

    /// Removes a file, which may be gone.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match self.disk.remove_file(&self.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes it, with those that it is in, unless it is there; every name of them is durable then.
    pub fn make(&self) -> io::Result<()> {
        if self.exists() {
            return Ok(());
        }
        let parent = self.parent();
        if let Some(parent) = &parent {
            parent.make()?;
        }
        match self.disk.make_directory(&self.path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists && self.exists() => Ok(()),
            made => made,
        }?;
        parent.map_or(Ok(()), |parent| parent.sync())
    }

    /// The directory that it is in.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let parent = self.path.parent()?;
        let path = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Some(Self { disk: Arc::clone(&self.disk), path: path.to_owned() })
    }

    /// Makes the names in it durable.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.sync_directory(&self.path)
    }

    /// Room on its disk.
    pub fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes(&self.path)
    }

    /// Writes a file under a name of its own, syncs it, and then gives it this name: it is there whole and durable, or as it
    /// was before.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let fresh = format!("{name}.tmp");
        let file = self.open(&fresh, Mode::Create)?;
        write_all_at(&*file, bytes, 0)?;
        file.sync_all()?;
        self.rename(&fresh, name)?;
        self.sync()
    }

    /// Removes it with all that is in it.
    pub fn remove_all(&self) -> io::Result<()> {
        self.remove_some(&mut usize::MAX.clone()).map(drop)
    }

    /// Removes it with all that is in it, but at most `left` names. True when it is gone.
    pub fn remove_some(&self, left: &mut usize) -> io::Result<bool> {
        for Entry { name, is_directory } in self.list()? {
            let is_gone = if is_directory {
                self.child(&name).remove_some(left)?
            } else {
                *left > 0 && self.remove(&name).map(|()| true)?
            };
            if !is_gone {
                return Ok(false);
            }
            *left -= usize::from(!is_directory);
        }
        self.disk.remove_directory(&self.path).map(|()| true)
    }
}

/// The disk of this machine.
#[must_use]
pub fn system() -> DiskRef {
    Arc::new(SystemDisk)
}

/// True when a file system says that it takes no direct writes.
pub(crate) fn is_direct_refused(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported)
}

/// True when there is no room, for whichever reason.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

#[derive(Debug)]
struct SystemDisk;

impl SystemDisk {
    fn open_file(path: &Path, mode: Mode) -> io::Result<File> {
        let flags = |flags: OFlags| flags.bits().cast_signed();
        let mut options = OpenOptions::new();
        options.mode(0o600);
        match mode {
            Mode::Read => options.read(true),
            Mode::Write => options.write(true),
            Mode::WriteDurable => options.write(true).custom_flags(flags(OFlags::DIRECT | OFlags::DSYNC)),
            Mode::Create => options.write(true).create(true).truncate(true),
            Mode::CreateDirect => options.write(true).create(true).truncate(true).custom_flags(flags(OFlags::DIRECT)),
            Mode::CreateNew => options.write(true).create_new(true),
        };
        options.open(path)
    }
}

impl Disk for SystemDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<FileRef> {
        Ok(Arc::new(SystemFile(Self::open_file(path, mode)?)))
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string() {
                entries.push(Entry { name, is_directory: entry.file_type()?.is_dir() });
            }
        }
        Ok(entries)
    }

    fn status(&self, path: &Path) -> io::Result<Status> {
        let metadata = fs::metadata(path)?;
        Ok(Status {
            bytes: metadata.len(),
            links: metadata.nlink(),
            is_directory: metadata.is_dir(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(path)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn lock(&self, path: &Path, of: LockOf) -> io::Result<Locked> {
        let mut file = match of {
            LockOf::Directory | LockOf::File => File::open(path)?,
            LockOf::FileMade => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?
            }
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let owner = file.read_to_string(&mut owner).ok().and_then(|_| owner.trim().parse().ok());
                return Ok(Locked::Taken(owner));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if of == LockOf::FileMade {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())?;
        }
        Ok(Locked::Held(Box::new(SystemLock { _file: file })))
    }
}

/// The lock goes when the file is closed.
#[derive(Debug)]
struct SystemLock {
    _file: File,
}

impl Lock for SystemLock {}

#[derive(Debug)]
struct SystemFile(File);

impl DiskFile for SystemFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(into, offset)
    }

    fn read_cached_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        match rustix::io::preadv2(&self.0, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(ErrorKind::WouldBlock.into()),
            read => Ok(read?),
        }
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(from, offset)
    }

    fn allocate(&self, bytes: u64) -> io::Result<bool> {
        match retry_on_intr(|| fallocate(&self.0, FallocateFlags::empty(), 0, bytes)) {
            Ok(()) => Ok(true),
            Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => Err(error.into()),
            Err(_) => Ok(false),
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn will_read_in_order(&self) {
        // A file system may not know the hint.
        if let Err(error) = rustix::fs::fadvise(&self.0, 0, None, Advice::Sequential) {
            tracing::debug!(%error, "a file is read as if it were not read in order");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_opened_as_its_mode_says() {
        use rustix::fs::{OFlags, fcntl_getfl};
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        let disk = SystemDisk;
        let flags = |mode: Mode| {
            let file = SystemDisk::open_file(&path, mode).ok()?;
            Some(fcntl_getfl(&file).unwrap() & (OFlags::DIRECT | OFlags::DSYNC))
        };
        assert_eq!(flags(Mode::CreateNew), Some(OFlags::empty()));
        assert_eq!(flags(Mode::CreateNew), None, "it is there");
        for (mode, expected) in [
            (Mode::Read, OFlags::empty()),
            (Mode::Write, OFlags::empty()),
            (Mode::Create, OFlags::empty()),
            (Mode::CreateDirect, OFlags::DIRECT),
            (Mode::WriteDurable, OFlags::DIRECT | OFlags::DSYNC),
        ] {
            match flags(mode) {
                Some(found) => assert_eq!(found, expected, "{mode:?}"),
                // A file system may not take direct writes.
                None => assert!(expected.contains(OFlags::DIRECT), "{mode:?}"),
            }
        }
        assert_eq!(disk.status(&path).unwrap().bytes, 0);
    }

    #[test]
    fn what_is_in_memory_is_read_without_waiting_and_what_is_not_may_not_be() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::on_system(root.path());
        directory.replace("file", &[7; 100_000]).unwrap();
        let plain = File::open(directory.join("file")).unwrap();
        // Where the system follows this advice, nothing of it is in memory then.
        rustix::fs::fadvise(&plain, 0, None, Advice::DontNeed).unwrap();
        let file = directory.open("file", Mode::Read).unwrap();
        let mut block = [0; 50_000];
        match file.read_cached_at(&mut block, 0) {
            Ok(count) => assert!(block[..count].iter().all(|byte| *byte == 7)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        read_exact_at(&*file, &mut [0; 100_000], 0).unwrap();
        match file.read_cached_at(&mut block, 60_000) {
            Ok(count) => assert_eq!((count, block[39_999]), (40_000, 7)),
            // A file system may not know how to say.
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}
