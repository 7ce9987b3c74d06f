//! From format 3 to format 4, at the first start of a program of format 4.
//!
//! First a copy is kept in `format-3/`, made of links, which is a data directory of its own: whoever wants to go back starts
//! the older program with it. Then a checkpoint of format 4 is written behind everything that the journal holds; that it
//! has its name is what counts. What stands before it is read as it is, as long as something of it is needed.

use std::io;

use crate::checkpoint;
use crate::data::{DataDirectory, DataError};
use crate::disk::{Directory, Entry};
use crate::recovery;
use crate::segment::Layout;
use crate::survey::Survey;

/// The copy goes when servers have run for so long on the new format.
pub const KEPT_MS: u64 = 7 * 24 * 60 * 60 * 1000;
const COPY: &str = "format-3";
const UNFINISHED: &str = "format-3.unfinished";

/// Where the copy of a data directory is kept.
#[must_use]
pub fn copy_of(root: &DataDirectory) -> Directory {
    root.root().child(COPY)
}

/// Takes a data directory over that was read whole. `now` is in milliseconds since 1970, UTC.
///
/// # Errors
/// [`DataError`]; it is still of the older format then, or whole in the new one.
pub fn take_over(root: &DataDirectory, survey: &mut Survey, now: u64) -> Result<(), DataError> {
    let copy = copy_of(root);
    keep_copy(root, survey, &copy).map_err(|error| DataError::Io(copy.path().to_owned(), error))?;
    let next = survey.segments.last().copied().unwrap_or(0).max(survey.layout.segment(survey.end)) + 1;
    survey.state.take_over(survey.layout.start(next), now);
    recovery::begin_anew(&root.checkpoints(), survey)
}

fn keep_copy(root: &DataDirectory, survey: &Survey, copy: &Directory) -> io::Result<()> {
    let unfinished = root.root().child(UNFINISHED);
    for old in [&unfinished, copy] {
        // Of a start that ended before this one; an older program may have gone on meanwhile.
        if old.exists() {
            old.remove_all()?;
        }
    }
    for part in ["", "journal", "checkpoint", "files"] {
        unfinished.child(part).make()?;
    }
    for segment in &survey.segments {
        let name = Layout::name(*segment);
        root.journal().link_or_copy_into(&name, &unfinished.child("journal"), &name)?;
    }
    if let Some(checkpoint) = survey.checkpoint {
        let name = checkpoint::name(checkpoint.number);
        root.checkpoints().link_or_copy_into(&name, &unfinished.child("checkpoint"), &name)?;
    }
    link_files(&root.files(), &unfinished.child("files"))?;
    for part in ["journal", "checkpoint", "files", ""] {
        unfinished.child(part).sync()?;
    }
    root.root().rename(UNFINISHED, COPY)?;
    root.root().sync()
}

/// Links every stored file.
fn link_files(files: &Directory, into: &Directory) -> io::Result<()> {
    let is_part = |entry: &Entry| entry.is_directory && entry.name != "incoming";
    for Entry { name, .. } in files.list()?.into_iter().filter(is_part) {
        let (from, to) = (files.child(&name), into.child(&name));
        to.make()?;
        for file in from.list()?.into_iter().filter(|entry| !entry.is_directory) {
            from.link_or_copy_into(&file.name, &to, &file.name)?;
        }
        to.sync()?;
    }
    Ok(())
}
