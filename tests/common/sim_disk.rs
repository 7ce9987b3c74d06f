//! A disk in memory that loses power, so that a test can see what the store makes of all that a real disk may do to it.
//!
//! What programs see (the cache) and what would be left without power (the medium) are kept apart. Whatever was changed and
//! not synced is pending: a restart after a cut keeps any part of it. Chance comes from a seed alone, so that a failure can
//! be had again.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::iter;
use std::mem;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kurir::disk::{Disk, DiskFile, Entry, FileRef, Lock, LockOf, Locked, Mode, Status};

/// The unit in which the cache and the medium hold files.
const PAGE: usize = 4096;
/// The same, for positions in files.
const PAGE_BYTES: u64 = PAGE as u64;
/// The unit that a disk writes whole or not at all, and that direct writes keep to.
const SECTOR: usize = 512;
/// With less room than this, a sync may find none for what it writes.
const NEARLY_FULL: u64 = 16 * PAGE_BYTES;
/// The directory that every path begins at.
const ROOT: u64 = 1;
/// The system's number for "input or output error".
const EIO: i32 = 5;
/// The system's number for "bad file descriptor", which reading a file opened to write gives, and the reverse.
const EBADF: i32 = 9;

/// What everybody gets from a disk without power, and from a handle that was opened before.
fn power_is_gone() -> io::Error {
    io::Error::other("power is gone")
}

/// What a disk that breaks says.
fn broken() -> io::Error {
    io::Error::from_raw_os_error(EIO)
}

/// How many pages so many bytes take.
fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES)
}

/// A position within a page, or a length of what is in memory: neither is ever too large.
fn small(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Divides a range of a file where its units meet: the position of each piece, and where it is in the buffer.
fn pieces(offset: u64, length: usize, unit: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    iter::from_fn(move || {
        let start = done;
        let at = offset + start as u64;
        done = length.min(start + unit - small(at % unit as u64));
        (start < length).then_some((at, start..done))
    })
}

/// Chance that is the same for the same seed (splitmix64, Steele and others 2014).
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number; everything else is made of it.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of the numbers below `count`, and 0 when there is none.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        small(self.next() % count.max(1) as u64)
    }

    /// True once in so many times.
    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.next().is_multiple_of(count.max(1))
    }

    /// True half of the time.
    fn coin(&mut self) -> bool {
        self.one_in(2)
    }
}

/// What a restart keeps of all that is pending. The two extremes are too rare by chance, and find faults of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    All,
    Nothing,
    Mixed,
}

/// Which way a write takes, and so what it has reached when it returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Cached,
    Direct,
    Durable,
}

impl How {
    /// None for a file that is only read.
    fn of(mode: Mode) -> Option<Self> {
        match mode {
            Mode::Read => None,
            Mode::Write | Mode::Create | Mode::CreateNew => Some(Self::Cached),
            Mode::CreateDirect => Some(Self::Direct),
            Mode::WriteDurable => Some(Self::Durable),
        }
    }
}

/// The bytes of a page, which its versions share with the cache and the medium while they are equal.
type Content = Arc<[u8; PAGE]>;

/// Changes a part of a page's bytes, and not those of others that share them.
fn overlay(content: &mut Content, at: usize, bytes: &[u8]) {
    Arc::make_mut(content)[at..at + bytes.len()].copy_from_slice(bytes);
}

/// What a page became by a change that is not synced.
#[derive(Clone)]
struct Version {
    content: Content,
    /// The file was cut off before the page. File systems keep that apart from the data, so a failed sync does not lose it.
    is_hole: bool,
}

/// A page of a file. It is dirty when it has versions: the last of them is what a sync writes.
#[derive(Clone)]
struct Page {
    cache: Content,
    medium: Content,
    versions: Vec<Version>,
}

impl Page {
    /// A page without anything pending.
    fn durable(content: Content) -> Self {
        Self { cache: Arc::clone(&content), medium: content, versions: Vec::new() }
    }

    /// What the disk was told last, which is not what the cache holds after a failed sync.
    fn latest(&self) -> &Content {
        self.versions.last().map_or(&self.medium, |version| &version.content)
    }

    /// Writes a part of it. A write through the cache takes the whole cached page along, as the kernel does; one past the
    /// cache does not, so that bytes which a failed sync lost stay lost.
    fn put(&mut self, at: usize, bytes: &[u8], how: How) {
        overlay(&mut self.cache, at, bytes);
        let content = match how {
            How::Cached => Arc::clone(&self.cache),
            How::Direct | How::Durable => {
                let mut content = Arc::clone(self.latest());
                overlay(&mut content, at, bytes);
                content
            }
        };
        if how == How::Durable {
            self.medium = content;
            self.versions.clear();
        } else {
            self.versions.push(Version { content, is_hole: false });
        }
    }

    /// The file ends before it now.
    fn punch(&mut self) {
        let zero = [0; PAGE];
        if *self.cache != zero || **self.latest() != zero {
            self.cache = Arc::new(zero);
            self.versions.push(Version { content: Arc::clone(&self.cache), is_hole: true });
        }
    }

    /// A sync came to its end.
    fn commit(&mut self) {
        if let Some(version) = self.versions.pop() {
            self.medium = version.content;
            self.versions.clear();
        }
    }

    /// A sync failed: it counts as clean, and what was written to it never reaches the medium.
    fn lose(&mut self) {
        let kept = self.versions.iter().rposition(|version| version.is_hole).map_or(0, |hole| hole + 1);
        self.versions.truncate(kept);
    }

    /// One of the contents that a cut may leave, whole.
    fn candidate(&self, random: &mut Random) -> &Content {
        match random.below(self.versions.len() + 1) {
            0 => &self.medium,
            chosen => &self.versions[chosen - 1].content,
        }
    }

    /// Takes what a cut left of it. Sectors may come from different writes, as a disk may stop within a page.
    fn survive(&mut self, fate: Fate, random: &mut Random) {
        let content = match fate {
            _ if self.versions.is_empty() => Arc::clone(&self.medium),
            Fate::Nothing => Arc::clone(&self.medium),
            Fate::All => Arc::clone(self.latest()),
            Fate::Mixed if random.one_in(4) => {
                let mut torn = [0; PAGE];
                for (at, sector) in torn.chunks_exact_mut(SECTOR).enumerate() {
                    let at = at * SECTOR;
                    sector.copy_from_slice(&self.candidate(random)[at..at + SECTOR]);
                }
                Arc::new(torn)
            }
            Fate::Mixed => Arc::clone(self.candidate(random)),
        };
        *self = Self::durable(content);
    }
}

impl Default for Page {
    fn default() -> Self {
        Self::durable(Arc::new([0; PAGE]))
    }
}

/// What a file holds.
#[derive(Clone, Default)]
struct Data {
    pages: BTreeMap<u64, Page>,
    /// The pages that room was taken for: written to, or set aside.
    held: BTreeSet<u64>,
    bytes: u64,
    medium_bytes: u64,
    /// Its sizes since the last sync.
    sizes: Vec<u64>,
}

impl Data {
    /// A file that was there for ever.
    fn durable(bytes: &[u8]) -> Self {
        let length = bytes.len() as u64;
        let mut data = Self { bytes: length, medium_bytes: length, ..Self::default() };
        for (number, bytes) in (0..).zip(bytes.chunks(PAGE)) {
            let mut content = Arc::new([0; PAGE]);
            overlay(&mut content, 0, bytes);
            data.pages.insert(number, Page::durable(content));
            data.held.insert(number);
        }
        data
    }

    /// Reads through the cache, within the size.
    fn read(&self, into: &mut [u8], offset: u64) {
        for (at, range) in pieces(offset, into.len(), PAGE) {
            let start = small(at % PAGE_BYTES);
            let into = &mut into[range];
            match self.pages.get(&(at / PAGE_BYTES)) {
                Some(page) => into.copy_from_slice(&page.cache[start..start + into.len()]),
                None => into.fill(0),
            }
        }
    }

    /// All that the cache holds.
    fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; small(self.bytes)];
        self.read(&mut bytes, 0);
        bytes
    }

    /// Makes it at least so long.
    fn grow(&mut self, bytes: u64) {
        if bytes > self.bytes {
            self.bytes = bytes;
            self.sizes.push(bytes);
        }
    }

    /// Writes what lies within one page.
    fn put(&mut self, at: u64, bytes: &[u8], how: How) {
        let number = at / PAGE_BYTES;
        self.pages.entry(number).or_default().put(small(at % PAGE_BYTES), bytes, how);
        self.held.insert(number);
        self.grow(at + bytes.len() as u64);
    }

    /// A write that came to its end. A durable one takes the size along, as `O_DSYNC` must to find the bytes again.
    fn write(&mut self, from: &[u8], offset: u64, how: How) {
        for (at, range) in pieces(offset, from.len(), PAGE) {
            self.put(at, &from[range], how);
        }
        if how == How::Durable {
            self.commit_size();
        }
    }

    /// A write that did not come to its end: any of its sectors may be there, and its size is not durable.
    fn write_some(&mut self, from: &[u8], offset: u64, how: How, random: &mut Random) {
        for (at, range) in pieces(offset, from.len(), SECTOR) {
            if random.coin() {
                self.put(at, &from[range], how);
            }
        }
    }

    /// Cuts it off or lengthens it. What was cut off reads as zeros if it is lengthened later.
    fn set_size(&mut self, bytes: u64) {
        let end = pages_of(bytes);
        for page in self.pages.range_mut(end..).map(|(_, page)| page) {
            page.punch();
        }
        self.held.split_off(&end);
        let tail = small(bytes % PAGE_BYTES);
        if bytes < self.bytes
            && tail > 0
            && let Some(page) = self.pages.get_mut(&(bytes / PAGE_BYTES))
        {
            page.put(tail, &[0; PAGE][tail..], How::Cached);
        }
        self.bytes = bytes;
        self.sizes.push(bytes);
    }

    /// Makes its size durable.
    fn commit_size(&mut self) {
        self.medium_bytes = self.bytes;
        self.sizes.clear();
    }

    /// A sync came to its end.
    fn commit(&mut self) {
        self.pages.values_mut().for_each(Page::commit);
        self.commit_size();
        self.pages.split_off(&pages_of(self.bytes));
    }

    /// A sync in whose middle power went.
    fn commit_some(&mut self, random: &mut Random) {
        for page in self.pages.values_mut().filter(|page| !page.versions.is_empty()) {
            if random.coin() {
                page.commit();
            }
        }
        if random.coin() {
            self.commit_size();
        }
    }

    /// Takes what a cut left of it. Pages and size are independent, as file systems promise no order between them.
    fn survive(&mut self, fate: Fate, random: &mut Random) {
        for page in self.pages.values_mut() {
            page.survive(fate, random);
        }
        self.bytes = match fate {
            Fate::All => self.bytes,
            Fate::Nothing => self.medium_bytes,
            Fate::Mixed => match random.below(self.sizes.len() + 1) {
                0 => self.medium_bytes,
                chosen => self.sizes[chosen - 1],
            },
        };
        self.commit_size();
        let end = pages_of(self.bytes);
        self.pages.split_off(&end);
        self.held.split_off(&end);
        self.held.extend(self.pages.keys());
        let tail = small(self.bytes % PAGE_BYTES);
        if tail > 0
            && let Some(page) = self.pages.get_mut(&(end - 1))
        {
            page.put(tail, &[0; PAGE][tail..], How::Durable);
        }
    }
}

/// What a directory holds.
#[derive(Clone, Default)]
struct Names {
    cache: BTreeMap<String, u64>,
    medium: BTreeMap<String, u64>,
}

/// What an inode is.
#[derive(Clone)]
enum Node {
    File(Data),
    Directory(Names),
}

/// A file or a directory, apart from its names, as it may have several or none.
#[derive(Clone)]
struct Inode {
    /// How many names it has in the cache.
    links: u64,
    node: Node,
}

/// A name in a directory gets another inode, or none.
#[derive(Clone)]
struct Assignment {
    directory: u64,
    name: String,
    inode: Option<u64>,
}

/// All of the disk. It is behind one lock, as tests use it from one thread.
#[derive(Clone)]
struct State {
    random: Random,
    inodes: BTreeMap<u64, Inode>,
    last_inode: u64,
    /// Changes of names that are not durable, in their order. The assignments of one survive together.
    pending: Vec<Vec<Assignment>>,
    locks: BTreeSet<u64>,
    has_power: bool,
    /// How often all handles became invalid: those of before are known by it.
    generation: u64,
    operations: u64,
    cut_at: Option<u64>,
    is_ordered: bool,
    takes_direct: bool,
    can_allocate: bool,
    has_short_writes: bool,
    failures: Option<u64>,
    next_sync_fails: bool,
    /// Room for all pages together.
    capacity: Option<u64>,
}

/// The disk, for itself and for its handles.
type Shared = Arc<Mutex<State>>;

/// Takes the lock, even after a test that failed while it had it.
fn enter(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looking things up.
impl State {
    /// An empty disk.
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let can_allocate = !random.one_in(8);
        let root = Inode { links: 1, node: Node::Directory(Names::default()) };
        Self {
            random,
            inodes: BTreeMap::from([(ROOT, root)]),
            last_inode: ROOT,
            pending: Vec::new(),
            locks: BTreeSet::new(),
            has_power: true,
            generation: 0,
            operations: 0,
            cut_at: None,
            is_ordered: false,
            takes_direct: true,
            can_allocate,
            has_short_writes: false,
            failures: None,
            next_sync_fails: false,
            capacity: None,
        }
    }

    /// A file to read.
    fn file(&self, inode: u64) -> io::Result<&Data> {
        match self.inodes.get(&inode).map(|inode| &inode.node) {
            Some(Node::File(data)) => Ok(data),
            Some(Node::Directory(_)) => Err(ErrorKind::IsADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    /// A file to change, and the chance to do it with.
    fn file_mut(&mut self, inode: u64) -> io::Result<(&mut Data, &mut Random)> {
        match self.inodes.get_mut(&inode).map(|inode| &mut inode.node) {
            Some(Node::File(data)) => Ok((data, &mut self.random)),
            Some(Node::Directory(_)) => Err(ErrorKind::IsADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    /// The names in a directory.
    fn names(&self, inode: u64) -> io::Result<&BTreeMap<String, u64>> {
        match self.inodes.get(&inode).map(|inode| &inode.node) {
            Some(Node::Directory(names)) => Ok(&names.cache),
            Some(Node::File(_)) => Err(ErrorKind::NotADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn is_directory(&self, inode: u64) -> bool {
        self.names(inode).is_ok()
    }

    fn look_up(&self, directory: u64, name: &str) -> io::Result<u64> {
        self.names(directory)?.get(name).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }

    /// What a path leads to.
    fn find(&self, path: &Path) -> io::Result<u64> {
        steps(path)?.into_iter().try_fold(ROOT, |directory, name| self.look_up(directory, name))
    }

    /// The directory that a path ends in, which is there, and the last name, which need not be.
    fn find_parent<'a>(&self, path: &'a Path) -> io::Result<(u64, &'a str)> {
        let mut steps = steps(path)?;
        let name = steps.pop().ok_or(ErrorKind::InvalidInput)?;
        let parent = steps.into_iter().try_fold(ROOT, |directory, name| self.look_up(directory, name))?;
        self.names(parent)?;
        Ok((parent, name))
    }

    /// Everything below a directory, each directory before what it holds.
    fn walk(&self, inode: u64, path: &Path, found: &mut Vec<(PathBuf, u64)>) {
        for (name, inode) in self.names(inode).into_iter().flatten() {
            let path = path.join(name);
            found.push((path.clone(), *inode));
            self.walk(*inode, &path, found);
        }
    }

    /// The room that all files with names take.
    fn used(&self) -> u64 {
        let pages = |inode: &Inode| match &inode.node {
            Node::File(data) if inode.links > 0 => data.held.len() as u64,
            _ => 0,
        };
        self.inodes.values().map(pages).sum::<u64>() * PAGE_BYTES
    }

    /// What is left of the room, if there is a limit.
    fn room(&self) -> Option<u64> {
        self.capacity.map(|capacity| capacity.saturating_sub(self.used()))
    }

    /// How much of a write has room. Pages of a file without a name are given back already, so none are counted.
    fn room_for(&self, inode: u64, offset: u64, length: usize) -> io::Result<usize> {
        let data = self.file(inode)?;
        let Some(mut room) = self.room() else { return Ok(length) };
        if self.inodes.get(&inode).is_some_and(|inode| inode.links == 0) {
            return Ok(length);
        }
        for (at, range) in pieces(offset, length, PAGE) {
            if data.held.contains(&(at / PAGE_BYTES)) {
                continue;
            }
            if room < PAGE_BYTES {
                return if range.start == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(range.start) };
            }
            room -= PAGE_BYTES;
        }
        Ok(length)
    }
}

/// The names of a path.
fn steps(path: &Path) -> io::Result<Vec<&str>> {
    if !path.is_absolute() {
        return Err(ErrorKind::InvalidInput.into());
    }
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => names.push(name.to_str().ok_or(ErrorKind::InvalidInput)?),
            Component::ParentDir | Component::Prefix(_) => return Err(ErrorKind::InvalidInput.into()),
        }
    }
    Ok(names)
}

/// Power, and faults.
impl State {
    /// Power goes.
    fn cut(&mut self) {
        self.has_power = false;
        self.cut_at = None;
    }

    /// Counts an operation; true when power goes in the middle of it.
    fn count(&mut self) -> bool {
        self.operations += 1;
        let goes = self.cut_at.is_some_and(|at| at <= self.operations);
        if goes {
            self.cut();
        }
        goes
    }

    /// An operation that is there as a whole, pending, or not at all, when power goes in the middle of it.
    fn change<T>(&mut self, act: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if !self.count() {
            return act(self);
        }
        if self.random.coin() {
            // Whether it would have failed is never told.
            act(self).ok();
        }
        Err(power_is_gone())
    }

    /// True when this write or sync is to fail.
    fn fails(&mut self) -> bool {
        self.failures.is_some_and(|one_in| self.random.one_in(one_in))
    }

    /// How much a write takes. Direct ones take whole sectors.
    fn shortened(&mut self, length: usize, how: How) -> usize {
        let unit = if how == How::Cached { 1 } else { SECTOR };
        let is_short = self.has_short_writes && length > unit && self.random.one_in(4);
        if is_short { unit * (1 + self.random.below(length / unit)) } else { length }
    }

    /// The disk starts again with a part of what was pending.
    fn restart(&mut self) {
        let fate = match self.random.below(8) {
            0 => Fate::All,
            1 => Fate::Nothing,
            _ => Fate::Mixed,
        };
        for operation in self.surviving_names(fate) {
            self.reach_medium(operation);
        }
        for inode in self.inodes.values_mut() {
            inode.links = 0;
            if let Node::Directory(names) = &mut inode.node {
                names.cache = names.medium.clone();
            }
        }
        self.prune();
        self.count_links();
        for inode in self.inodes.values_mut() {
            if let Node::File(data) = &mut inode.node {
                data.survive(fate, &mut self.random);
            }
        }
        self.forget_handles();
        self.has_power = true;
        self.cut_at = None;
        self.next_sync_fails = false;
    }

    /// The changes of names that a restart keeps, out of those that are pending.
    fn surviving_names(&mut self, fate: Fate) -> Vec<Vec<Assignment>> {
        let mut pending = mem::take(&mut self.pending);
        match fate {
            Fate::All => {}
            Fate::Nothing => pending.clear(),
            Fate::Mixed if self.is_ordered => pending.truncate(self.random.below(pending.len() + 1)),
            Fate::Mixed => pending.retain(|_| self.random.coin()),
        }
        pending
    }

    /// Counts anew how many names each inode has, as the names that survive need not agree with what was counted before.
    fn count_links(&mut self) {
        let inodes = self.inodes.values();
        let names = inodes.filter_map(|inode| match &inode.node {
            Node::Directory(names) => Some(&names.cache),
            Node::File(_) => None,
        });
        let named: Vec<u64> = iter::once(ROOT).chain(names.flat_map(BTreeMap::values).copied()).collect();
        for inode in named {
            if let Some(inode) = self.inodes.get_mut(&inode) {
                inode.links += 1;
            }
        }
    }

    /// Forgets inodes that no name leads to, whatever a cut would keep. There must be no handles.
    fn prune(&mut self) {
        let mut reached = BTreeSet::new();
        let mut next: Vec<u64> = self.pending.iter().flatten().filter_map(|assignment| assignment.inode).collect();
        next.push(ROOT);
        while let Some(inode) = next.pop() {
            if !reached.insert(inode) {
                continue;
            }
            if let Some(Inode { node: Node::Directory(names), .. }) = self.inodes.get(&inode) {
                next.extend(names.cache.values().chain(names.medium.values()));
            }
        }
        self.inodes.retain(|inode, _| reached.contains(inode));
    }

    /// Makes all handles and locks of before invalid.
    fn forget_handles(&mut self) {
        self.generation += 1;
        self.locks.clear();
    }
}

/// Names.
impl State {
    /// A new inode, which has no name yet.
    fn add(&mut self, node: Node) -> u64 {
        self.last_inode += 1;
        self.inodes.insert(self.last_inode, Inode { links: 0, node });
        self.last_inode
    }

    /// Changes names at once for everybody who looks, and for the medium some time.
    fn assign(&mut self, operation: Vec<Assignment>) {
        for Assignment { directory, name, inode } in &operation {
            let Some(Inode { node: Node::Directory(names), .. }) = self.inodes.get_mut(directory) else { continue };
            let before = match inode {
                Some(inode) => names.cache.insert(name.clone(), *inode),
                None => names.cache.remove(name),
            };
            if let Some(inode) = inode.and_then(|inode| self.inodes.get_mut(&inode)) {
                inode.links += 1;
            }
            if let Some(inode) = before.and_then(|inode| self.inodes.get_mut(&inode)) {
                inode.links -= 1;
            }
        }
        self.pending.push(operation);
    }

    /// The same for one name.
    fn assign_one(&mut self, directory: u64, name: &str, inode: Option<u64>) {
        self.assign(vec![Assignment { directory, name: name.to_owned(), inode }]);
    }

    /// An operation becomes durable. A directory that is gone has no names to change.
    fn reach_medium(&mut self, operation: Vec<Assignment>) {
        for Assignment { directory, name, inode } in operation {
            let Some(Inode { node: Node::Directory(names), .. }) = self.inodes.get_mut(&directory) else { continue };
            match inode {
                Some(inode) => names.medium.insert(name, inode),
                None => names.medium.remove(&name),
            };
        }
    }

    /// Makes operations durable: those wanted, and those before them that they build on, being of the same names. Without
    /// the latter, an older operation that survives would undo a newer one that is durable.
    fn commit_names(&mut self, is_wanted: impl Fn(&Assignment) -> bool) {
        let mut touched = BTreeSet::new();
        let mut chosen = Vec::new();
        let mut kept = Vec::new();
        for operation in mem::take(&mut self.pending).into_iter().rev() {
            let name_of = |assignment: &Assignment| (assignment.directory, assignment.name.clone());
            if operation.iter().any(|assignment| is_wanted(assignment) || touched.contains(&name_of(assignment))) {
                touched.extend(operation.iter().map(name_of));
                chosen.push(operation);
            } else {
                kept.push(operation);
            }
        }
        self.pending = kept.into_iter().rev().collect();
        for operation in chosen.into_iter().rev() {
            self.reach_medium(operation);
        }
    }

    /// A new file, or one that is there and loses what it held.
    fn create(&mut self, path: &Path, must_be_new: bool) -> io::Result<u64> {
        let (directory, name) = self.find_parent(path)?;
        match self.look_up(directory, name) {
            Ok(_) if must_be_new => Err(ErrorKind::AlreadyExists.into()),
            Ok(inode) => {
                self.file_mut(inode)?.0.set_size(0);
                Ok(inode)
            }
            Err(_) => {
                let inode = self.add(Node::File(Data::default()));
                self.assign_one(directory, name, Some(inode));
                Ok(inode)
            }
        }
    }

    /// The inode that a handle is to have.
    fn open(&mut self, path: &Path, mode: Mode) -> io::Result<u64> {
        if matches!(mode, Mode::WriteDurable | Mode::CreateDirect) && !self.takes_direct {
            return Err(ErrorKind::InvalidInput.into());
        }
        match mode {
            Mode::Read | Mode::Write | Mode::WriteDurable => {
                let inode = self.find(path)?;
                self.file(inode)?;
                Ok(inode)
            }
            Mode::Create | Mode::CreateDirect => self.change(|state| state.create(path, false)),
            Mode::CreateNew => self.change(|state| state.create(path, true)),
        }
    }

    /// An empty directory.
    fn make_directory(&mut self, path: &Path) -> io::Result<u64> {
        let (directory, name) = self.find_parent(path)?;
        if self.look_up(directory, name).is_ok() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let inode = self.add(Node::Directory(Names::default()));
        self.assign_one(directory, name, Some(inode));
        Ok(inode)
    }

    /// Another name for the same inode; both names change together or not at all.
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (from_directory, from_name) = self.find_parent(from)?;
        let (to_directory, to_name) = self.find_parent(to)?;
        let inode = self.look_up(from_directory, from_name)?;
        let is_directory = self.is_directory(inode);
        if is_directory && steps(to)?.starts_with(&steps(from)?) && steps(to)? != steps(from)? {
            return Err(ErrorKind::InvalidInput.into());
        }
        if let Ok(there) = self.look_up(to_directory, to_name) {
            match self.names(there) {
                _ if there == inode => return Ok(()),
                Ok(_) if !is_directory => return Err(ErrorKind::IsADirectory.into()),
                Ok(names) if !names.is_empty() => return Err(ErrorKind::DirectoryNotEmpty.into()),
                Err(error) if is_directory => return Err(error),
                _ => {}
            }
        }
        self.assign(vec![
            Assignment { directory: to_directory, name: to_name.to_owned(), inode: Some(inode) },
            Assignment { directory: from_directory, name: from_name.to_owned(), inode: None },
        ]);
        Ok(())
    }

    /// A second name for a file.
    fn link(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let inode = self.find(from)?;
        if self.is_directory(inode) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let (directory, name) = self.find_parent(to)?;
        if self.look_up(directory, name).is_ok() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.assign_one(directory, name, Some(inode));
        Ok(())
    }

    /// One name less; the inode stays for its handles, and because a cut may bring the name back.
    fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.find_parent(path)?;
        self.file(self.look_up(directory, name)?)?;
        self.assign_one(directory, name, None);
        Ok(())
    }

    /// The same for a directory that is empty.
    fn remove_directory(&mut self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.find_parent(path)?;
        if !self.names(self.look_up(directory, name)?)?.is_empty() {
            return Err(ErrorKind::DirectoryNotEmpty.into());
        }
        self.assign_one(directory, name, None);
        Ok(())
    }

    /// Makes names durable: those in the directory, or all of them where order is kept.
    fn sync_directory(&mut self, path: &Path) -> io::Result<()> {
        let directory = self.find(path)?;
        self.names(directory)?;
        if self.count() {
            // Everything stays pending, of which the restart keeps any part.
            return Err(power_is_gone());
        }
        if self.fails() {
            return Err(broken());
        }
        let is_ordered = self.is_ordered;
        self.commit_names(|assignment| is_ordered || assignment.directory == directory);
        Ok(())
    }

    /// The directory at a path, which is made with all that it is in, durable at once.
    fn make_root(&mut self, path: &Path) -> io::Result<u64> {
        let mut inode = ROOT;
        for name in steps(path)? {
            let directory = inode;
            inode = match self.look_up(directory, name) {
                Ok(inode) => inode,
                Err(_) => self.add(Node::Directory(Names::default())),
            };
            self.name_durably(directory, name, inode);
        }
        Ok(inode)
    }

    /// Gives an inode a name that no cut takes away.
    fn name_durably(&mut self, directory: u64, name: &str, inode: u64) {
        if !self.look_up(directory, name).is_ok_and(|there| there == inode) {
            self.assign_one(directory, name, Some(inode));
        }
        self.commit_names(|assignment| assignment.directory == directory && assignment.name == name);
    }

    /// Copies a directory of this machine, in the order of names, so that inodes are numbered the same each time.
    fn import(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let directory = self.make_root(to)?;
        let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let kind = entry.file_type()?;
            let name = entry.file_name().into_string().map_err(|_| ErrorKind::InvalidInput)?;
            if kind.is_dir() {
                self.import(&entry.path(), &to.join(&name))?;
            } else if kind.is_file() {
                let inode = self.add(Node::File(Data::durable(&fs::read(entry.path())?)));
                self.name_durably(directory, &name, inode);
            }
        }
        Ok(())
    }
}

/// What files hold.
impl State {
    /// A write as a process sees it: whole, short, or an error with a part of it written.
    fn write(&mut self, inode: u64, from: &[u8], offset: u64, how: How) -> io::Result<usize> {
        let is_torn = self.count();
        let fits = self.room_for(inode, offset, from.len());
        let part = &from[..*fits.as_ref().unwrap_or(&0)];
        if is_torn {
            let (data, random) = self.file_mut(inode)?;
            data.write_some(part, offset, how, random);
            return Err(power_is_gone());
        }
        if self.fails() {
            let how = if how == How::Durable { How::Direct } else { how };
            let (data, random) = self.file_mut(inode)?;
            if random.coin() {
                data.write_some(part, offset, how, random);
            }
            return Err(broken());
        }
        let length = self.shortened(fits?, how);
        self.file_mut(inode)?.0.write(&from[..length], offset, how);
        Ok(length)
    }

    /// A sync of a file. After one that failed, Linux takes what it lost for written; the next one says nothing of it.
    fn sync(&mut self, inode: u64) -> io::Result<()> {
        if self.count() {
            let (data, random) = self.file_mut(inode)?;
            data.commit_some(random);
            return Err(power_is_gone());
        }
        if mem::take(&mut self.next_sync_fails) || self.fails() {
            self.file_mut(inode)?.0.pages.values_mut().for_each(Page::lose);
            return Err(broken());
        }
        if self.room().is_some_and(|room| room < NEARLY_FULL) && self.random.one_in(16) {
            return Err(ErrorKind::StorageFull.into());
        }
        self.file_mut(inode)?.0.commit();
        if self.is_ordered {
            self.commit_names(|_| true);
        }
        Ok(())
    }

    /// Takes the room for so many bytes now, so that writing them later needs none.
    fn allocate(&mut self, inode: u64, bytes: u64) -> io::Result<bool> {
        if !self.can_allocate {
            return Ok(false);
        }
        if self.room_for(inode, 0, small(bytes))? < small(bytes) {
            return Err(ErrorKind::StorageFull.into());
        }
        let (data, _) = self.file_mut(inode)?;
        data.held.extend(0..pages_of(bytes));
        data.grow(bytes);
        Ok(true)
    }

    /// Reads at least a byte where there is one. Each of `short_in` reads comes to less than it could.
    fn read(&mut self, inode: u64, into: &mut [u8], offset: u64, short_in: u64) -> io::Result<usize> {
        let (data, random) = self.file_mut(inode)?;
        let mut length = into.len().min(small(data.bytes.saturating_sub(offset)));
        if length > 1 && random.one_in(short_in) {
            length = 1 + random.below(length);
        }
        data.read(&mut into[..length], offset);
        Ok(length)
    }
}

/// A disk in memory that loses power.
pub(crate) struct SimDisk {
    state: Shared,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").finish_non_exhaustive()
    }
}

impl SimDisk {
    /// An empty disk with power and without faults. All that it does by chance follows from the seed.
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { state: Arc::new(Mutex::new(State::new(seed))) })
    }

    /// A copy to try something on while the original goes on. It has power and no faults, whatever the original has, and no
    /// handles.
    pub(crate) fn snapshot(&self) -> Arc<Self> {
        let mut state = enter(&self.state);
        let random = Random(state.random.next());
        let healthy = State { random, has_power: true, cut_at: None, failures: None, ..state.clone() };
        let mut copy = State { next_sync_fails: false, capacity: None, ..healthy };
        copy.forget_handles();
        Arc::new(Self { state: Arc::new(Mutex::new(copy)) })
    }

    /// The disk, if it has power.
    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = enter(&self.state);
        if state.has_power { Ok(state) } else { Err(power_is_gone()) }
    }

    /// Names survive a cut in their order, and any sync makes all of them durable, as on ext4 and xfs. Otherwise any of
    /// them survive, which is all that is promised.
    pub(crate) fn set_ordered(&self, is_ordered: bool) {
        enter(&self.state).is_ordered = is_ordered;
    }

    /// Whether files can be opened past the page cache, which some file systems refuse.
    pub(crate) fn set_direct(&self, takes_direct: bool) {
        enter(&self.state).takes_direct = takes_direct;
    }

    /// Each write and sync fails with this chance, or none does.
    pub(crate) fn set_failures(&self, one_in: Option<u64>) {
        let mut state = enter(&self.state);
        state.failures = one_in;
        state.next_sync_fails = false;
    }

    /// The next sync of a file fails, and what it should have written is lost without a word from the syncs after it.
    pub(crate) fn fail_next_sync(&self) {
        enter(&self.state).next_sync_fails = true;
    }

    /// A quarter of the writes may take less than they were given.
    pub(crate) fn set_short_writes(&self, has_short_writes: bool) {
        enter(&self.state).has_short_writes = has_short_writes;
    }

    /// How much room is left from now on; None for no limit.
    pub(crate) fn set_room(&self, bytes: Option<u64>) {
        let mut state = enter(&self.state);
        let used = state.used();
        state.capacity = bytes.map(|bytes| bytes.saturating_add(used));
    }

    /// Power goes now.
    pub(crate) fn cut(&self) {
        enter(&self.state).cut();
    }

    /// Power goes in the middle of the operation with this number from now on. The next one has number 1, and 0 means
    /// the same.
    pub(crate) fn cut_after(&self, operations: u64) {
        let mut state = enter(&self.state);
        state.cut_at = Some(state.operations + operations.max(1));
    }

    /// True when there is no power.
    pub(crate) fn is_cut(&self) -> bool {
        !enter(&self.state).has_power
    }

    /// How many operations there were that change something, so that a test can cut in each of them.
    pub(crate) fn operations(&self) -> u64 {
        enter(&self.state).operations
    }

    /// Power comes back: what survived is what there is. Power that was not cut before is cut by it.
    pub(crate) fn restart(&self) {
        enter(&self.state).restart();
    }

    /// What looked like a cut was the end of the process, in the middle of what it did: what the machine has in memory stays.
    pub(crate) fn was_no_cut(&self) {
        let mut state = enter(&self.state);
        state.has_power = true;
        state.cut_at = None;
        state.forget_handles();
        state.prune();
    }

    /// The process that used the disk is gone, and the machine is not: handles and locks go, and nothing else.
    pub(crate) fn end_process(&self) {
        let mut state = enter(&self.state);
        state.forget_handles();
        state.prune();
    }

    /// Makes a directory, with all that it is in, durable at once: where a test begins.
    pub(crate) fn make_root(&self, path: &Path) -> io::Result<()> {
        self.powered()?.make_root(path).map(drop)
    }

    /// The paths of all files below a directory, in order. There are none without power.
    pub(crate) fn files_below(&self, path: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        if let Ok(state) = self.powered()
            && let Ok(inode) = state.find(path)
        {
            state.walk(inode, path, &mut found);
            found.retain(|(_, inode)| !state.is_directory(*inode));
        }
        found.into_iter().map(|(path, _)| path).collect()
    }

    /// All that a file holds for those who read it now.
    pub(crate) fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.powered()?;
        Ok(state.file(state.find(path)?)?.all())
    }

    /// Copies a directory of this machine into the disk, durable at once, so that a test can begin with real data.
    pub(crate) fn import(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.powered()?.import(from, to)
    }

    /// Copies a directory, as it reads now, to this machine, where other programs can look at it.
    pub(crate) fn export(&self, from: &Path, to: &Path) -> io::Result<()> {
        let state = self.powered()?;
        let mut found = Vec::new();
        state.walk(state.find(from)?, Path::new(""), &mut found);
        fs::create_dir_all(to)?;
        for (path, inode) in found {
            match state.file(inode) {
                Ok(data) => fs::write(to.join(path), data.all())?,
                Err(_) => fs::create_dir_all(to.join(path))?,
            }
        }
        Ok(())
    }

    /// Changes a file behind everybody's back, as a disk does that decays.
    pub(crate) fn corrupt(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut bytes = self.read_file(path)?;
        change(&mut bytes);
        let mut state = self.powered()?;
        let inode = state.find(path)?;
        *state.file_mut(inode)?.0 = Data::durable(&bytes);
        Ok(())
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<FileRef> {
        let mut state = self.powered()?;
        let inode = state.open(path, mode)?;
        Ok(Arc::new(SimFile { state: Arc::clone(&self.state), inode, generation: state.generation, mode }))
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.powered()?.change(|state| state.make_directory(path).map(drop))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut state = self.powered()?;
        let names = state.names(state.find(path)?)?.iter();
        let mut entries: Vec<Entry> =
            names.map(|(name, inode)| Entry { name: name.clone(), is_directory: state.is_directory(*inode) }).collect();
        for last in (1..entries.len()).rev() {
            entries.swap(last, state.random.below(last + 1));
        }
        Ok(entries)
    }

    fn status(&self, path: &Path) -> io::Result<Status> {
        let state = self.powered()?;
        let number = state.find(path)?;
        let inode = state.inodes.get(&number).ok_or(ErrorKind::NotFound)?;
        let (bytes, is_directory) = match &inode.node {
            Node::File(data) => (data.bytes, false),
            Node::Directory(_) => (PAGE_BYTES, true),
        };
        Ok(Status { bytes, links: inode.links, is_directory, identity: (1, number) })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.powered()?.change(|state| state.rename(from, to))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.powered()?.change(|state| state.link(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.powered()?.change(|state| state.remove_file(path))
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        self.powered()?.change(|state| state.remove_directory(path))
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.powered()?.sync_directory(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let state = self.powered()?;
        state.find(path)?;
        Ok(state.room().unwrap_or(u64::MAX / 2))
    }

    fn lock(&self, path: &Path, of: LockOf) -> io::Result<Locked> {
        let mut state = self.powered()?;
        let inode = match state.find(path) {
            Err(error) if error.kind() == ErrorKind::NotFound && of == LockOf::FileMade => {
                state.change(|state| state.create(path, true))?
            }
            found => found?,
        };
        match of {
            LockOf::Directory => state.names(inode).map(drop),
            LockOf::File | LockOf::FileMade => state.file(inode).map(drop),
        }?;
        if !state.locks.insert(inode) {
            return Ok(Locked::Taken(None));
        }
        Ok(Locked::Held(Box::new(SimLock { state: Arc::clone(&self.state), inode, generation: state.generation })))
    }
}

/// A lock of a process, which goes with it.
struct SimLock {
    state: Shared,
    inode: u64,
    generation: u64,
}

impl Lock for SimLock {}

impl fmt::Debug for SimLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimLock").field("inode", &self.inode).finish_non_exhaustive()
    }
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = enter(&self.state);
        // A lock of a process that is gone must not free what another one holds.
        if state.generation == self.generation {
            state.locks.remove(&self.inode);
        }
    }
}

/// An open file, which works until its process or the power goes.
struct SimFile {
    state: Shared,
    inode: u64,
    generation: u64,
    mode: Mode,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile").field("inode", &self.inode).field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl SimFile {
    /// The disk, if it has power and the file was opened since power or process last went.
    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = enter(&self.state);
        if state.has_power && state.generation == self.generation { Ok(state) } else { Err(power_is_gone()) }
    }

    /// The same for those who read.
    fn readable(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.powered()?;
        if self.mode == Mode::Read { Ok(state) } else { Err(io::Error::from_raw_os_error(EBADF)) }
    }

    /// The same for those who write, and how they do.
    fn writable(&self) -> io::Result<(MutexGuard<'_, State>, How)> {
        let state = self.powered()?;
        let how = How::of(self.mode).ok_or_else(|| io::Error::from_raw_os_error(EBADF))?;
        Ok((state, how))
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.readable()?.read(self.inode, into, offset, 16)
    }

    fn read_cached_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.readable()?;
        if state.random.one_in(3) {
            return Err(ErrorKind::WouldBlock.into());
        }
        state.read(self.inode, into, offset, 4)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize> {
        let (mut state, how) = self.writable()?;
        let is_aligned = [from.as_ptr().addr(), from.len()].iter().all(|value| value.is_multiple_of(SECTOR))
            && offset.is_multiple_of(SECTOR as u64);
        if how != How::Cached && !is_aligned {
            return Err(ErrorKind::InvalidInput.into());
        }
        state.write(self.inode, from, offset, how)
    }

    fn allocate(&self, bytes: u64) -> io::Result<bool> {
        self.writable()?.0.change(|state| state.allocate(self.inode, bytes))
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.writable()?.0.change(|state| {
            state.file_mut(self.inode)?.0.set_size(bytes);
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.powered()?.sync(self.inode)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.powered()?.sync(self.inode)
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.powered()?.file(self.inode)?.bytes)
    }

    fn will_read_in_order(&self) {}
}
