//! Room for the journal on the disk: the next segment is made before it is needed, and what is not needed goes.

use std::io;
use std::path::PathBuf;

use tracing::warn;

use crate::change::Lsn;
use crate::checkpoint;
use crate::disk::Directory;
use crate::segment::{Layout, Segment, SegmentStore};

/// Names of the copy of an older format that go at once, so that the journal waits for little of it.
const COPY_NAMES_AT_ONCE: usize = 1024;

/// What the loop wants done.
#[derive(Debug, Default)]
pub struct SpaceJob {
    /// Segments that are not needed any more.
    pub freed: Vec<u64>,
    /// So many segments may be kept in all.
    pub segments_max: u64,
    /// Checkpoints that a later one has replaced.
    pub outdated: Vec<u64>,
    /// The next segment should be made,
    pub is_more_wanted: bool,
    /// if so many bytes stay free for a checkpoint.
    pub kept_free: u64,
    /// The copy of the data in an older format should go.
    pub is_copy_outdated: bool,
}

/// What the disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceDone {
    /// There are segments up to here.
    pub room: Lsn,
    /// There was no room for another.
    pub is_full: bool,
    /// How many segments there are.
    pub segments: u64,
    /// How many of them are kept to be used again.
    pub spare: u64,
    /// There is something left of the copy of the data in an older format.
    pub has_copy: bool,
}

/// Does it.
#[derive(Debug)]
pub struct Space {
    segments: SegmentStore,
    checkpoints: Directory,
    copy: Directory,
    has_copy: bool,
    layout: Layout,
}

impl Space {
    /// Looks after these segments, the checkpoints in a directory, and the copy of an older format, if there is one.
    #[must_use]
    pub fn new(segments: SegmentStore, checkpoints: Directory, copy: Directory, layout: Layout) -> Self {
        let has_copy = copy.is_no_link();
        Self { segments, checkpoints, copy, has_copy, layout }
    }

    /// Does one job. A segment that was made is for the journal, before the loop hears of it.
    ///
    /// # Errors
    /// What the disk said, and where.
    pub fn run(&mut self, job: &SpaceJob) -> Result<(SpaceDone, Option<Segment>), (PathBuf, io::Error)> {
        for number in &job.outdated {
            let name = checkpoint::name(*number);
            self.checkpoints.remove(&name).map_err(|error| (self.checkpoints.join(&name), error))?;
        }
        if job.is_copy_outdated && self.has_copy {
            self.remove_copy();
        }
        let directory = self.segments.directory().path().to_owned();
        let failed = |error| (directory.clone(), error);
        self.segments.release(&job.freed, job.segments_max).map_err(failed)?;
        let made = if job.is_more_wanted { self.segments.prepare(job.kept_free).map_err(failed)? } else { None };
        let is_full = job.is_more_wanted && made.is_none();
        Ok((SpaceDone { is_full, ..self.done() }, made))
    }

    /// Some of the copy of an older format goes. One that cannot be removed is left to whoever made it so.
    fn remove_copy(&mut self) {
        let mut left = COPY_NAMES_AT_ONCE;
        match self.copy.remove_some(&mut left) {
            Ok(is_gone) => self.has_copy = !is_gone,
            Err(error) => {
                warn!(%error, "{} is not needed any more and could not be removed", self.copy.path().display());
                self.has_copy = false;
            }
        }
    }

    /// What there is now.
    #[must_use]
    pub fn done(&self) -> SpaceDone {
        let room = self.layout.start(self.segments.last() + 1);
        let (segments, spare) = (self.segments.count(), self.segments.spare());
        SpaceDone { room, is_full: false, segments, spare, has_copy: self.has_copy }
    }
}
