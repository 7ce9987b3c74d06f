//! The data directory: where things stand in it, and the lock that one process at a time holds.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::segment::VERSION;

/// A data directory that this process owns until it drops this.
#[derive(Debug)]
pub struct DataDirectory {
    root: PathBuf,
    _lock: File,
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
            Self::Io(path, error) if error.kind() == io::ErrorKind::AlreadyExists => {
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
                "{} is of version {version} of the format, and this kurir knows version {VERSION}: start it with one that knows the other",
                path.display()
            ),
            Self::Damaged(path, byte) => write!(
                f,
                "{} is damaged at byte {byte}: what stood there had been synced; `kurir check DIR --repair` keeps what is good",
                path.display()
            ),
            Self::Missing(path) => write!(f, "{} is missing, and what is left of the journal needs it", path.display()),
        }
    }
}

impl std::error::Error for DataError {}

impl DataDirectory {
    /// Takes the directory, and makes it (mode 0700) with its parts if they are missing.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn open(root: &Path) -> Result<Self, DataError> {
        // A mistyped path is not made a data directory beside what is there.
        if !exists(root) && has_files(root) {
            return Err(DataError::NotOurs(root.to_owned()));
        }
        make(root).map_err(|error| DataError::Io(root.to_owned(), error))?;
        // Its name must be as durable as what is in it.
        let parent = root.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync(parent).map_err(|error| DataError::Io(parent.to_owned(), error))?;
        let directory = Self::lock(root)?;
        for part in [directory.journal(), directory.checkpoints(), directory.files(), directory.incoming()] {
            make(&part).map_err(|error| DataError::Io(part.clone(), error))?;
        }
        for written in [root, &directory.files()] {
            sync(written).map_err(|error| DataError::Io(written.to_owned(), error))?;
        }
        Ok(directory)
    }

    /// Takes a directory that is there, and changes nothing in it.
    ///
    /// # Errors
    /// [`DataError`]
    pub fn look_at(root: &Path) -> Result<Self, DataError> {
        let path = root.join("lock");
        let mut lock = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::lock(root),
            opened => opened.map_err(|error| DataError::Io(path.clone(), error))?,
        };
        take(&mut lock, root, &path)?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    fn lock(root: &Path) -> Result<Self, DataError> {
        let path = root.join("lock");
        let failed = |error| DataError::Io(path.clone(), error);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        take(&mut lock, root, &path)?;
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// Where the journal is.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        journal(&self.root)
    }

    /// Where the checkpoints are.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints(&self.root)
    }

    /// Where stored files are.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        files(&self.root)
    }

    /// Where the admin socket is.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        admin_socket(&self.root)
    }

    /// Where a repair puts stored files that nothing lists any more.
    #[must_use]
    pub fn lost_files(&self) -> PathBuf {
        self.root.join("lost-files")
    }

    fn incoming(&self) -> PathBuf {
        self.files().join("incoming")
    }
}

/// True when there is something in a directory besides what a file system of its own has there.
fn has_files(root: &Path) -> bool {
    let names = fs::read_dir(root).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
    names.filter_map(|name| name.into_string().ok()).any(|name| name != "lost+found" && !name.starts_with('.'))
}

/// Locks the lock file, or says who has it.
fn take(lock: &mut File, root: &Path, path: &Path) -> Result<(), DataError> {
    match lock.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let known = lock.read_to_string(&mut owner).ok().and_then(|_| owner.trim().parse().ok());
            Err(DataError::InUse(root.to_owned(), known))
        }
        Err(TryLockError::Error(error)) => Err(DataError::Io(path.to_owned(), error)),
    }
}

/// Where the journal of a data directory is.
#[must_use]
pub fn journal(root: &Path) -> PathBuf {
    root.join("journal")
}

/// Where the checkpoints of a data directory are.
#[must_use]
pub fn checkpoints(root: &Path) -> PathBuf {
    root.join("checkpoint")
}

/// Where the stored files of a data directory are.
#[must_use]
pub fn files(root: &Path) -> PathBuf {
    root.join("files")
}

/// Where the server of a data directory can be reached by its administrator.
#[must_use]
pub fn admin_socket(root: &Path) -> PathBuf {
    root.join("admin.sock")
}

fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// What the disk said.
pub fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// True when `root` looks like a data directory that was used before.
#[must_use]
pub fn exists(root: &Path) -> bool {
    fs::metadata(root.join("lock")).is_ok() || fs::metadata(journal(root)).is_ok()
}
