//! The data directory: where things stand in it, and the locks that one process at a time holds.
//!
//! The directory itself is locked, which nobody can take away from under its owner by removing a name, and beside it the
//! file `lock`, which older programs lock, and which says who the owner is.

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::disk::{self, Directory, DiskRef, Entry, Lock, LockOf, Locked};
use crate::segment::{VERSION, VERSION_MIN};

/// What older programs lock.
const LOCK: &str = "lock";

/// A data directory that this process owns until it drops this.
#[derive(Debug)]
pub struct DataDirectory {
    place: Place,
    _locks: Vec<Box<dyn Lock>>,
}

/// Where a data directory is, and which one it is, whatever its name may come to mean.
#[derive(Clone, Debug)]
pub struct Place {
    root: Directory,
    identity: (u64, u64),
}

impl Place {
    /// True as long as its path leads to the directory that was locked: another one there may be another server's.
    #[must_use]
    pub fn is_still_there(&self) -> bool {
        match self.root.disk().status(self.root.path()) {
            Ok(status) => status.identity == self.identity,
            // Anything else says nothing of where it is.
            Err(error) => error.kind() != ErrorKind::NotFound,
        }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.root.path()
    }
}

/// Why a data directory could not be opened.
#[derive(Debug)]
pub enum DataError {
    /// There are other files in it.
    NotOurs(PathBuf),
    /// Another process has it; its id, if it is known.
    InUse(PathBuf, Option<u32>),
    /// The disk said so.
    Io(PathBuf, io::Error),
    /// The file is not one of ours, or its beginning is damaged.
    Foreign(PathBuf),
    /// The file is of a version that this program does not know.
    OtherVersion(PathBuf, u32),
    /// What stands at this byte of the file, and had been synced, cannot be read.
    Damaged(PathBuf, u64),
    /// A file is not there without which nothing is known.
    Missing(PathBuf),
    /// There is no checkpoint here, and without one nothing is known of what the journal does not hold any more.
    NoCheckpoint(PathBuf),
    /// There are stored files, and this journal that should list them is empty.
    JournalLost(PathBuf),
    /// This is damaged, and no file says how the journal lies, so that nothing can be made of what is left.
    Hopeless(PathBuf),
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOurs(root) => {
                write!(f, "{} is no data directory, and there is something in it", root.display())
            }
            Self::InUse(root, Some(process)) => {
                write!(f, "data directory {} is in use by process {process}", root.display())
            }
            Self::InUse(root, None) => write!(f, "data directory {} is in use", root.display()),
            Self::Io(path, error) if error.kind() == ErrorKind::AlreadyExists => {
                write!(f, "{} is not a directory", path.display())
            }
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Foreign(path) => {
                write!(
                    f,
                    "{} is not a journal file of kurir, or its beginning is damaged; if so, `kurir check DIR --repair` mends it",
                    path.display()
                )
            }
            Self::OtherVersion(path, version) => write!(
                f,
                "{} is of version {version} of the format, and this kurir knows versions {VERSION_MIN} and {VERSION}: use a kurir that knows the other",
                path.display()
            ),
            Self::Damaged(path, byte) => write!(
                f,
                "{} is damaged at byte {byte}: what stood there had been synced; `kurir check DIR --repair` keeps what is good",
                path.display()
            ),
            Self::Missing(path) => write!(
                f,
                "{} is missing, and what is left of the journal needs it; `kurir check DIR --repair` keeps what is good",
                path.display()
            ),
            Self::NoCheckpoint(path) => write!(
                f,
                "there is no checkpoint in {}, and the journal does not go back to its beginning: put the checkpoint back, or a backup in place of all; `kurir check DIR --repair` keeps what little can be read without it",
                path.display()
            ),
            Self::JournalLost(path) => write!(
                f,
                "there are stored files, and the journal {} that should list them is empty: put a backup in its place, or move the files away",
                path.display()
            ),
            Self::Hopeless(path) => write!(
                f,
                "{} is not a journal file of kurir, or its beginning is damaged, and nothing else tells how to read what is left; put a backup in its place",
                path.display()
            ),
        }
    }
}

impl std::error::Error for DataError {}

impl DataDirectory {
    /// Takes the directory on the disk of this machine, and makes it (mode 0700) with its parts if they are missing.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(root: &Path) -> Result<Self, DataError> {
        Self::open_on(disk::system(), root)
    }

    /// The same on another disk.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open_on(disk: DiskRef, root: &Path) -> Result<Self, DataError> {
        let root = Directory::new(disk, root.to_owned());
        let failed = |directory: &Directory| {
            let path = directory.path().to_owned();
            move |error| DataError::Io(path, error)
        };
        // A mistyped path is not made a data directory beside what is there.
        if !is_data(&root) && has_files(&root) {
            return Err(DataError::NotOurs(root.path().to_owned()));
        }
        root.make().map_err(failed(&root))?;
        let directory = Self::lock(root, LockOf::FileMade)?;
        let parts = [directory.journal(), directory.checkpoints(), directory.files(), directory.incoming()];
        for part in &parts {
            part.make().map_err(failed(part))?;
        }
        // A process before this one may have made them and not come to sync them.
        for written in [&directory.files(), directory.root()] {
            written.sync().map_err(failed(written))?;
        }
        if let Some(parent) = directory.root().parent() {
            parent.sync().map_err(failed(&parent))?;
        }
        Ok(directory)
    }

    /// Takes a directory that is there on the disk of this machine, and changes nothing in it.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn look_at(root: &Path) -> Result<Self, DataError> {
        Self::look_at_on(disk::system(), root)
    }

    /// The same on another disk.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn look_at_on(disk: DiskRef, root: &Path) -> Result<Self, DataError> {
        Self::lock(Directory::new(disk, root.to_owned()), LockOf::File)
    }

    fn lock(root: Directory, file: LockOf) -> Result<Self, DataError> {
        let disk = DiskRef::clone(root.disk());
        let (path, lock) = (root.path().to_owned(), root.join(LOCK));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| DataError::Io(path, error)
        };
        let mut locks = Vec::new();
        // The directory first, so that whoever is refused has not made a lock file.
        match disk.lock(&path, LockOf::Directory) {
            Ok(Locked::Held(held)) => locks.push(held),
            Ok(Locked::Taken(_)) => {
                // The file says who has it.
                let owner = match disk.lock(&lock, LockOf::File) {
                    Ok(Locked::Taken(owner)) => owner,
                    _ => None,
                };
                return Err(DataError::InUse(path, owner));
            }
            // Network file systems lock no directories; there the file alone must do.
            Err(error) if is_lock_refused(&error) => {
                tracing::debug!(%error, "the file system does not lock directories");
            }
            Err(error) => return Err(failed(&path)(error)),
        }
        let file = if locks.is_empty() { LockOf::FileMade } else { file };
        match disk.lock(&lock, file) {
            Ok(Locked::Held(held)) => locks.push(held),
            Ok(Locked::Taken(owner)) => return Err(DataError::InUse(path, owner)),
            Err(error) if error.kind() == ErrorKind::NotFound && file == LockOf::File => {}
            Err(error) => return Err(failed(&lock)(error)),
        }
        let identity = disk.status(&path).map_err(failed(&path))?.identity;
        Ok(Self { place: Place { root, identity }, _locks: locks })
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Directory {
        &self.place.root
    }

    /// Where it is, and which one.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Where the journal is.
    #[must_use]
    pub fn journal(&self) -> Directory {
        self.place.root.child("journal")
    }

    /// Where the checkpoints are.
    #[must_use]
    pub fn checkpoints(&self) -> Directory {
        self.place.root.child("checkpoint")
    }

    /// Where stored files are.
    #[must_use]
    pub fn files(&self) -> Directory {
        self.place.root.child("files")
    }

    /// Where the admin socket is.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        admin_socket(self.place.root.path())
    }

    /// Where a repair puts stored files that nothing lists any more.
    #[must_use]
    pub fn lost_files(&self) -> Directory {
        self.place.root.child("lost-files")
    }

    /// Where uploads are that are coming in.
    #[must_use]
    pub fn incoming(&self) -> Directory {
        self.files().child("incoming")
    }
}

/// True when there is something in a directory besides what a file system of its own has there.
fn has_files(root: &Directory) -> bool {
    let is_file = |entry: &Entry| entry.name != "lost+found" && !entry.name.starts_with('.');
    root.list().is_ok_and(|entries| entries.iter().any(is_file))
}

/// What a network file system says to the lock of a directory.
fn is_lock_refused(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::BADF | Errno::INVAL | Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS))
}

/// Where the server of a data directory can be reached by its administrator.
#[must_use]
pub fn admin_socket(root: &Path) -> PathBuf {
    root.join("admin.sock")
}

/// True when `root` looks like a data directory that was used before.
#[must_use]
pub fn exists(root: &Path) -> bool {
    exists_on(&disk::system(), root)
}

/// The same on another disk.
#[must_use]
pub fn exists_on(disk: &DiskRef, root: &Path) -> bool {
    is_data(&Directory::new(DiskRef::clone(disk), root.to_owned()))
}

fn is_data(root: &Directory) -> bool {
    root.has(LOCK) || root.has("journal")
}
