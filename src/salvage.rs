//! What can still be read of a damaged journal, and a journal made of that.
//!
//! Positions stay what they are: where a record cannot be read, a repair puts voids of the same size. The damaged files
//! are kept beside the repaired ones.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::aligned::BLOCK_BYTES;
use crate::change::{Change, Lsn, Place, Target};
use crate::data::{self, DataError};
use crate::record::{self, BODY_BYTES_MAX, HEADER_BYTES, RECORD_BYTES_MIN};
use crate::recovery;
use crate::segment::{Layout, Stream};

/// Searched at once for a record that is whole; as much again must be behind it, so that any record is.
const SEARCH_BYTES: usize = BODY_BYTES_MAX + HEADER_BYTES;

/// Something that had been synced and cannot be read.
#[derive(Clone, Debug)]
pub struct Damage {
    /// In which file.
    pub path: PathBuf,
    /// From where.
    pub byte: u64,
    /// How much.
    pub bytes: u64,
    /// What it may have been.
    pub what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, byte, bytes, what } = self;
        write!(f, "{} byte {byte}, {bytes} bytes: {what}", path.display())
    }
}

/// What a journal holds, and what is wrong with it.
#[derive(Debug)]
pub struct Survey {
    /// How many changes can be read.
    pub changes: u64,
    /// Where the good records end.
    pub end: Lsn,
    /// What had been synced and cannot be read.
    pub damage: Vec<Range<Lsn>>,
}

/// Shows what can be read of a journal from a position on, damaged or not, and changes nothing. It had been synced up to the
/// end of `known` at least.
///
/// # Errors
/// [`DataError`], but not for damage.
pub fn survey(
    journal: &Path,
    layout: Layout,
    segments: &BTreeSet<u64>,
    known: Range<Lsn>,
    mut show: impl FnMut(&Change<'_>, Place),
) -> Result<Survey, DataError> {
    let failed = |error| DataError::Io(journal.to_owned(), error);
    let mut survey = Survey { changes: 0, end: known.start, damage: Vec::new() };
    let mut at = known.start;
    loop {
        let (end, changes) = recovery::replay(journal, layout, at, Lsn(u64::MAX), &mut show)?;
        survey.changes += changes;
        // As at the start of a server: what nobody says had been synced is the torn end of a write.
        if end >= known.end && !recovery::synced_past(journal, layout, segments, end).map_err(failed)? {
            survey.end = end;
            return Ok(survey);
        }
        at = match next_record(journal, layout, segments, end).map_err(failed)? {
            Some(next) => next,
            None => known.end.max(layout.start(segments.last().map_or(0, |last| last + 1))),
        };
        survey.damage.push(end..at);
    }
}

/// The first whole record behind the bad one at `bad`.
fn next_record(journal: &Path, layout: Layout, segments: &BTreeSet<u64>, bad: Lsn) -> io::Result<Option<Lsn>> {
    let end = layout.start(segments.last().map_or(0, |last| last + 1));
    let mut at = Lsn(bad.0 + RECORD_BYTES_MIN as u64);
    let mut window = Vec::new();
    while at < end {
        window.clear();
        Stream::new(journal, layout, at, Lsn(at.0 + 2 * SEARCH_BYTES as u64)).read_to_end(&mut window)?;
        let searched = window.len().min(SEARCH_BYTES);
        if let Some(start) = record::find_next(&window, layout.salt, at, searched) {
            return Ok(Some(Lsn(at.0 + start as u64)));
        }
        // A file that is short or missing is gone over.
        at = if searched > 0 { Lsn(at.0 + searched as u64) } else { layout.start(layout.segment(at) + 1) };
    }
    Ok(None)
}

/// The damage as a person may want to know it, record by record as far as they can be told apart.
///
/// # Errors
/// What the disk said.
pub fn describe(journal: &Path, layout: Layout, damage: &Range<Lsn>) -> io::Result<Vec<Damage>> {
    let mut bytes = Vec::new();
    Stream::new(journal, layout, damage.start, damage.end).take(2 * SEARCH_BYTES as u64).read_to_end(&mut bytes)?;
    let mut described = Vec::new();
    let (mut at, mut rest) = (damage.start, &*bytes);
    while at < damage.end {
        let left = damage.end.0 - at.0;
        let one = record::claimed_bytes(rest).filter(|bytes| *bytes as u64 <= left && *bytes <= rest.len());
        // What is left over must be long enough for a record, or it is none.
        let one = one.filter(|bytes| *bytes as u64 == left || *bytes as u64 + RECORD_BYTES_MIN as u64 <= left);
        let (bytes, what) = match one.and_then(|bytes| Some((bytes, record::claimed_body(rest)?))) {
            Some((bytes, body)) => {
                (bytes as u64, Change::decode(body).map_or("a record".to_owned(), |change| say(&change)))
            }
            None => (left, "records that cannot be told apart".to_owned()),
        };
        let path = Layout::path(journal, layout.segment(at));
        described.push(Damage { path, byte: layout.offset(at), bytes, what });
        at.0 += bytes;
        rest = rest.get(usize::try_from(bytes).unwrap_or(usize::MAX)..).unwrap_or_default();
    }
    Ok(described)
}

/// What a damaged record seems to be. No text of a message is shown, and no hash.
fn say(change: &Change<'_>) -> String {
    match change {
        Change::UserAdded { name, .. } => format!("perhaps the account {name}"),
        Change::PasswordChanged { .. } => "perhaps a new password".to_owned(),
        Change::UserRemoved { .. } => "perhaps the end of an account".to_owned(),
        Change::SessionOpened { .. } | Change::SessionUsed { .. } | Change::SessionClosed { .. } => {
            "perhaps a login".to_owned()
        }
        Change::GroupCreated { name, .. } => format!("perhaps the group {name}"),
        Change::MemberJoined { .. } | Change::MemberLeft { .. } => "perhaps a member of a group".to_owned(),
        Change::MessageSent { from_name, to_name, to, .. } => {
            let group = if matches!(to, Target::Group(_)) { "group " } else { "" };
            format!("perhaps a message from {from_name} to {group}{to_name}")
        }
        Change::MessageMoved { from_name, to_name, .. } => {
            format!("perhaps a message from {from_name} to {to_name}, written again")
        }
        Change::Delivered { .. } => "perhaps that messages were delivered".to_owned(),
        Change::FileStored { name, .. } | Change::FileSent { name, .. } => format!("perhaps the file {name}"),
        Change::FileMoved { .. } => "perhaps a file, written again".to_owned(),
        Change::FileLost { .. } => "perhaps the end of a file that was lost".to_owned(),
        Change::FileDropped { name, .. } => format!("perhaps the end of the file {name}"),
    }
}

/// Puts voids where the damage is, and makes broken segments whole again. Says where the files are kept as they were.
///
/// # Errors
/// What the disk said, and where.
pub fn repair(
    journal: &Path,
    layout: Layout,
    damage: &[Range<Lsn>],
    broken: impl Iterator<Item = u64>,
) -> Result<Vec<PathBuf>, DataError> {
    let touched: BTreeSet<u64> = damage
        .iter()
        .flat_map(|range| layout.segment(range.start)..=layout.segment(Lsn(range.end.0 - 1)))
        .chain(broken)
        .collect();
    let mut kept = Vec::new();
    for segment in touched {
        let path = Layout::path(journal, segment);
        kept.extend(repair_one(&path, layout, segment, damage).map_err(|error| DataError::Io(path, error))?);
    }
    Ok(kept)
}

fn repair_one(path: &Path, layout: Layout, segment: u64, damage: &[Range<Lsn>]) -> io::Result<Option<PathBuf>> {
    let mut bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let was_there = !bytes.is_empty();
    bytes.resize(BLOCK_BYTES + usize::try_from(layout.segment_bytes).unwrap_or(usize::MAX), 0);
    bytes[..BLOCK_BYTES].copy_from_slice(&layout.header(segment));
    let (start, end) = (layout.start(segment), layout.start(segment + 1));
    for range in damage.iter().filter(|range| range.start < end && range.end > start) {
        let bytes_of = |from: Lsn, to: Lsn| usize::try_from(to.0 - from.0).unwrap_or(usize::MAX);
        let voids = record::voids(bytes_of(range.start, range.end), layout.salt, range.start);
        let (from, to) = (range.start.max(start), range.end.min(end));
        let place = BLOCK_BYTES + bytes_of(start, from)..BLOCK_BYTES + bytes_of(start, to);
        bytes[place].copy_from_slice(&voids[bytes_of(range.start, from)..bytes_of(range.start, to)]);
    }
    replace(path, &bytes, was_there)
}

/// Puts `bytes` in the place of the file at `path`, and keeps the file under another name; says which.
///
/// # Errors
/// What the disk said.
pub fn replace(path: &Path, bytes: &[u8], was_there: bool) -> io::Result<Option<PathBuf>> {
    let fresh = path.with_added_extension("tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let kept = if was_there { Some(keep(path)?) } else { None };
    fs::rename(&fresh, path)?;
    path.parent().map_or(Ok(()), data::sync)?;
    Ok(kept)
}

/// Gives a file a second name, under which it stays as it is.
///
/// # Errors
/// What the disk said.
pub fn keep(path: &Path) -> io::Result<PathBuf> {
    let names = (1..).map(|number| path.with_added_extension(format!("damaged-{number}")));
    let kept = names.into_iter().find(|name| fs::symlink_metadata(name).is_err()).unwrap_or_default();
    fs::hard_link(path, &kept)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::sample::Sample;

    fn look(sample: &Sample) -> (Survey, Vec<u32>) {
        let segments = crate::segment::list(&sample.directory.journal()).unwrap();
        let mut users = Vec::new();
        let journal = sample.directory.journal();
        let survey =
            survey(&journal, sample.layout, &segments, sample.layout.first()..Lsn(0), |change, _| match change {
                Change::UserAdded { user, .. } => users.push(user.0),
                other => panic!("nobody wrote {other:?}"),
            });
        (survey.unwrap(), users)
    }

    #[test]
    fn a_repair_keeps_every_change_but_the_damaged_one() {
        // Of the last batch nobody can say whether it had been synced.
        for damaged in 0..10 {
            let sample = Sample::new(6, 1500, true);
            assert_eq!(look(&sample).1, (0..12).collect::<Vec<u32>>());
            let place = sample.places[damaged];
            sample.flip(Lsn(place.lsn.0 + 40));
            let (path, _) = sample.file(place.lsn);
            let before = fs::read(&path).unwrap();
            let (survey, users) = look(&sample);
            assert_eq!(survey.damage, [place.lsn..place.end()]);
            let journal = sample.directory.journal();
            let described = describe(&journal, sample.layout, &survey.damage[0]).unwrap();
            assert_eq!(described.len(), 1);
            assert!(
                described[0].to_string().contains(&format!("perhaps the account user{damaged}")),
                "{}",
                described[0]
            );
            let kept = repair(&journal, sample.layout, &survey.damage, [].into_iter()).unwrap();
            assert_eq!(fs::read(&kept[0]).unwrap(), before);
            assert_eq!(sample.users().unwrap().0, users);
            assert_eq!(users, (0..12).filter(|user| *user as usize != damaged).collect::<Vec<u32>>());
        }
    }

    #[test]
    fn a_lost_segment_and_a_damaged_header_can_be_gone_over() {
        let sample = Sample::new(8, 1500, true);
        let journal = sample.directory.journal();
        fs::remove_file(Layout::path(&journal, 2)).unwrap();
        let third = Layout::path(&journal, 3);
        let mut bytes = fs::read(&third).unwrap();
        bytes[9] ^= 1;
        fs::write(&third, &bytes).unwrap();
        let (survey, users) = look(&sample);
        let kept = repair(&journal, sample.layout, &survey.damage, [2, 3].into_iter()).unwrap();
        assert!(kept.contains(&third.with_added_extension("damaged-1")), "{kept:?}");
        let (found, _) = sample.users().unwrap();
        assert_eq!(found, users);
        assert!(found.len() >= 6 && found.contains(&0) && found.contains(&15), "{found:?}");
    }

    #[test]
    fn records_that_cannot_be_told_apart_are_described_together() {
        let sample = Sample::new(4, 20, true);
        for place in &sample.places[1..3] {
            // The length, so that it is not known where the next one stands.
            sample.flip(Lsn(place.lsn.0 + 1));
        }
        let (survey, users) = look(&sample);
        assert_eq!(users, [0, 3, 4, 5, 6, 7]);
        let journal = sample.directory.journal();
        let described: Vec<Damage> =
            survey.damage.iter().flat_map(|damage| describe(&journal, sample.layout, damage).unwrap()).collect();
        let bytes: u64 = described.iter().map(|damage| damage.bytes).sum();
        let places = sample.places[1..3].iter().map(|place| u64::from(place.bytes)).sum::<u64>();
        // The mark between them may be lost with them.
        assert!((places..places + 40).contains(&bytes), "{described:?}");
        repair(&journal, sample.layout, &survey.damage, [].into_iter()).unwrap();
        assert_eq!(sample.users().unwrap().0, users);
    }
}
