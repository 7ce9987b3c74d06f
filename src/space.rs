//! Room for the journal on the disk: the next segment is made before it is needed, and what is not needed goes.

use std::io;
use std::path::PathBuf;

use crate::change::Lsn;
use crate::checkpoint;
use crate::segment::{self, Layout, Segment, SegmentStore};

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
}

/// Does it.
#[derive(Debug)]
pub struct Space {
    segments: SegmentStore,
    checkpoints: PathBuf,
    layout: Layout,
}

impl Space {
    /// Looks after these segments and the checkpoints in a directory.
    #[must_use]
    pub fn new(segments: SegmentStore, checkpoints: PathBuf, layout: Layout) -> Self {
        Self { segments, checkpoints, layout }
    }

    /// Does one job. A segment that was made is for the journal, before the loop hears of it.
    ///
    /// # Errors
    /// What the disk said, and where.
    pub fn run(&mut self, job: &SpaceJob) -> Result<(SpaceDone, Option<Segment>), (PathBuf, io::Error)> {
        for number in &job.outdated {
            let path = checkpoint::path(&self.checkpoints, *number);
            segment::remove(&path).map_err(|error| (path, error))?;
        }
        let directory = self.segments.directory().to_owned();
        let failed = |error| (directory.clone(), error);
        self.segments.release(&job.freed, job.segments_max).map_err(failed)?;
        let made = if job.is_more_wanted { self.segments.prepare(job.kept_free).map_err(failed)? } else { None };
        let is_full = job.is_more_wanted && made.is_none();
        Ok((SpaceDone { is_full, ..self.done() }, made))
    }

    /// What there is now.
    #[must_use]
    pub fn done(&self) -> SpaceDone {
        let room = self.layout.start(self.segments.last() + 1);
        SpaceDone { room, is_full: false, segments: self.segments.count(), spare: self.segments.spare() }
    }
}
