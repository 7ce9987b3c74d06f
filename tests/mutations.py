#!/usr/bin/env python3
"""Leaves out one sync after the other, and each mend of a fault, and says which of them the tests find.

    tests/mutations.py [--only WORD] [--seeds N] [--keep DIR]

It is run by hand: each mutation is made in a copy of the last commit, built, and tried with the tests of the disk; one that
all of them pass is printed as NOT FOUND, and then the exit code is 1. It needs cargo and git, and takes half an hour and more.
A mutation that does not fit the source any more is an error, so that the list stays true.

What it leaves alone: the syncs that only spread out what a disk has to write at once (every piece of a checkpoint and every
mebibyte of an upload), since the sync at the end makes the same durable.
"""

import argparse
import os
import subprocess
import sys
import tempfile

SIMULATION = ["--test", "simulation"]
TAKEOVER = ["--test", "takeover"]
REPAIR = ["--test", "repair"]
DISK = ["--test", "disk"]
UNIT = ["--lib"]

# What it is; the file; what stands there, once; what stands there instead; the tests that may find it.
MUTATIONS = [
    # The journal.
    ("segments are not opened durable", "src/segment.rs",
     "if access == Access::Direct { Mode::WriteDurable } else", "if access == Access::Direct { Mode::Write } else", [SIMULATION]),
    ("the open segment is not synced", "src/journal.rs",
     "            self.open.file.sync_data()?;\n", "", [SIMULATION]),
    ("full segments are not synced", "src/journal.rs",
     "            for file in self.unsynced.drain(..) {\n                file.sync_data()?;\n            }\n",
     "            self.unsynced.clear();\n", [SIMULATION]),
    ("what is handed over is not synced", "src/journal.rs",
     "            file.sync_data()?;\n        }\n        Ok(self.end)", "            drop(file);\n        }\n        Ok(self.end)", [SIMULATION]),
    ("the files of a handed over list are not all synced", "src/journal.rs",
     "        for file in self.files {", "        for file in self.files.into_iter().rev().take(1) {", [SIMULATION]),
    # Segments.
    ("a new segment is not synced", "src/segment.rs",
     "BLOCK_BYTES as u64 + self.layout.segment_bytes)?;\n        file.sync_all()\n", "BLOCK_BYTES as u64 + self.layout.segment_bytes)?;\n        Ok(())\n", [SIMULATION]),
    ("a segment that was set aside is not synced", "src/segment.rs",
     "            write_all_at(&*file, &header, 0)?;\n            return file.sync_all();", "            write_all_at(&*file, &header, 0)?;\n            return Ok(());", [SIMULATION]),
    ("the name of a new segment is not synced", "src/segment.rs",
     "        self.directory.rename(&fresh, &Layout::name(number))?;\n        self.directory.sync()?;\n",
     "        self.directory.rename(&fresh, &Layout::name(number))?;\n", [SIMULATION]),
    ("a segment loses its old name without a sync", "src/segment.rs",
     "return self.directory.sync().map(|()| true);", "return Ok(true);", [SIMULATION]),
    ("the new header of a used segment is not synced", "src/segment.rs",
     "        write_all_at(&*file, &[0; BLOCK_BYTES], BLOCK_BYTES as u64)?;\n        file.sync_all()\n",
     "        write_all_at(&*file, &[0; BLOCK_BYTES], BLOCK_BYTES as u64)?;\n        Ok(())\n", [SIMULATION]),
    ("the wiped end of a segment is not synced", "src/segment.rs",
     "layout.offset(lsn), end)?;\n    file.sync_all()\n", "layout.offset(lsn), end)?;\n    Ok(())\n", [REPAIR]),
    ("the torn end is not wiped", "src/recovery.rs",
     "        wipe(journal, layout, end, synced < end).map_err(failed)?;\n", "", [UNIT]),
    ("zeros in the page cache are believed", "src/recovery.rs",
     "        wipe(journal, layout, end, synced < end)", "        wipe(journal, layout, end, false)", [REPAIR]),
    ("a linked segment is written to", "src/recovery.rs",
     "        segment::own(journal, last).map_err(failed)?;\n", "", [UNIT]),
    # Checkpoints.
    ("a checkpoint is not synced", "src/checkpoint.rs",
     "        self.file.set_len(self.written)?;\n        self.file.sync_all()?;\n", "        self.file.set_len(self.written)?;\n", [SIMULATION]),
    ("the name of a checkpoint is not synced", "src/checkpoint.rs",
     "&name(self.number))?;\n        self.directory.sync()\n", "&name(self.number))?;\n        Ok(())\n", [SIMULATION]),
    ("a checkpoint counts before the journal is on the disk", "src/compaction.rs",
     "Stage::Written { .. } => self.span.until.is_none_or(|until| until <= synced),", "Stage::Written { .. } => true,", [SIMULATION]),
    ("a group is not written before it changes", "src/state.rs",
     "        self.keep_group(group);\n        let was_member", "        let was_member", [UNIT]),
    ("a user is not written before it goes", "src/state.rs", "        self.keep_user(user);\n", "", [UNIT]),
    ("messages that a checkpoint has are taken again", "src/mailbox.rs",
     "        lsn < self.changed\n", "        false && lsn < self.changed\n", [UNIT]),
    # Stored files.
    ("an upload is not synced", "src/files.rs", "        upload.file.sync_all()?;\n", "", [SIMULATION]),
    ("the name of a stored file is not synced", "src/files.rs",
     "        if let Err(error) = directory.sync() {", "        if let Err(error) = directory.status(&name(file)).map(drop) {", [SIMULATION]),
    ("the directory of stored files is not synced", "src/files.rs",
     "            self.root.sync()?;\n            self.made", "            self.made", [REPAIR]),
    # The data directory.
    ("the names of new directories are not synced", "src/disk.rs",
     "        parent.map_or(Ok(()), |parent| parent.sync())\n", "        Ok(())\n", [SIMULATION, TAKEOVER, REPAIR]),
    ("the parts of the data directory are not synced", "src/data.rs",
     "            written.sync().map_err(failed(written))?;\n", "            drop(written);\n", [REPAIR]),
    ("the name of the data directory is not synced", "src/data.rs",
     "            parent.sync().map_err(failed(&parent))?;\n", "            drop(parent);\n", [REPAIR]),
    # A start.
    ("what no mark covers is not written once more", "src/recovery.rs",
     "    write_once_more(&journal, &survey).map_err(failed)?;\n", "", [SIMULATION]),
    ("what is written once more is not synced", "src/recovery.rs",
     "        target.sync_data()?;\n", "", [SIMULATION]),
    ("the names of checkpoints are not synced at a start", "src/recovery.rs",
     "    checkpoints.sync().map_err(|error| DataError::Io(checkpoints.path().to_owned(), error))?;\n", "", [REPAIR]),
    ("the names of segments are not synced at a start", "src/recovery.rs",
     "    journal.sync().map_err(failed)?;\n    let is_taken_over", "    let is_taken_over", [REPAIR]),
    ("spare segments go without a sync between them", "src/recovery.rs",
     "journal.remove(&Layout::name(segment)).and_then(|()| journal.sync()).map_err(failed)?;", "journal.remove(&Layout::name(segment)).map_err(failed)?;", [SIMULATION]),
    # Taking over, and repairs.
    ("the parts of the copy of format 3 are not synced", "src/takeover.rs",
     "        unfinished.child(part).sync()?;\n", "", [TAKEOVER]),
    ("the files of the copy of format 3 are not synced", "src/takeover.rs", "        to.sync()?;\n", "", [TAKEOVER]),
    ("the name of the copy of format 3 is not synced", "src/takeover.rs",
     "    root.root().rename(UNFINISHED, COPY)?;\n    root.root().sync()\n", "    root.root().rename(UNFINISHED, COPY)\n", [TAKEOVER]),
    ("what is put aside is not synced", "src/files.rs", "        aside.sync()?;\n", "", [REPAIR]),
    ("what is kept of damaged files is not synced", "src/check.rs",
     "        directory.sync().map_err(failed)?;\n    }\n    Ok(kept)", "    }\n    Ok(kept)", [REPAIR]),
    ("a replaced file is not synced", "src/disk.rs",
     "        file.sync_all()?;\n        self.rename(&fresh, name)?;\n", "        self.rename(&fresh, name)?;\n", [SIMULATION, REPAIR]),
    ("the name of a replaced file is not synced", "src/disk.rs",
     "        self.rename(&fresh, name)?;\n        self.sync()\n", "        self.rename(&fresh, name)\n", [SIMULATION, REPAIR]),
    # Backups.
    ("a copied file is not synced", "src/disk.rs",
     "        file.sync_all()?;\n        Ok(bytes)", "        Ok(bytes)", [SIMULATION]),
    ("a linked segment is not synced", "src/backup.rs",
     "return into.open(&name, Mode::Read).and_then(|file| file.sync_all()).map_err(failed);", "return Ok(());", [SIMULATION]),
    ("the stored files of a backup are not synced", "src/backup.rs",
     "            into.sync().map_err(|error| BackupError::Io(into.path().to_owned(), error))?;\n", "", [SIMULATION]),
    ("the directories of a backup are not synced", "src/backup.rs",
     "            directory.sync().map_err(|error| BackupError::Io(directory.path().to_owned(), error))?;\n", "", [SIMULATION]),
    ("the name of a backup is not synced", "src/backup.rs",
     "        self.to.parent().map_or(Ok(()), |parent| parent.sync()).map_err(failed)?;\n", "", [SIMULATION]),
    # The real disk.
    ("durable writes are not asked for", "src/disk.rs", "flags(OFlags::DIRECT | OFlags::DSYNC)", "flags(OFlags::DIRECT)", [UNIT]),
    # The mends of faults.
    ("segments made before the loop are not in the list", "src/log.rs",
     "            self.segments.extend(next..self.layout.segment(room));\n", "            self.segments.extend((next..self.layout.segment(room)).rev().take(1));\n", [SIMULATION, DISK, UNIT]),
    ("a backup does not read its copy", "src/backup.rs",
     "copy.fill(point).and_then(|()| copy.verify(point))", "copy.fill(point)", [DISK]),
    ("no mark is written after idleness", "src/engine.rs", "            self.service.log.mark();\n", "", [DISK]),
    ("the directory itself is not locked", "src/data.rs",
     "            Ok(Locked::Held(held)) => locks.push(held),\n            Ok(Locked::Taken(_)) => {\n                // The file",
     "            Ok(Locked::Held(held)) => drop(held),\n            Ok(Locked::Taken(_)) => {\n                // The file", [DISK]),
    ("nobody looks whether the directory is still there", "src/net.rs",
     "            self.look_at_directory(Instant::now())?;\n", "", [DISK]),
    ("threads are not waited for", "src/threads.rs", "            drop(handle.join());\n", "            drop(handle);\n", [UNIT]),
    ("a checkpoint is written at once", "src/compaction.rs",
     "            block.len() < *block_bytes\n", "            true\n", [UNIT]),
    ("a repair gives ids again", "src/survey.rs",
     "                    state.skip_ids(self.bytes_behind(damage.start).max(bytes));\n", "", [UNIT, REPAIR]),
    ("a repair gives numbers again", "src/survey.rs", "        state.skip_numbers(skipped);\n", "", [UNIT, REPAIR]),
]


def run(command, directory, environment, seconds):
    """The exit code of a command, or none where it took too long, and what it printed."""
    try:
        done = subprocess.run(command, cwd=directory, env=environment, timeout=seconds, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        return None, ""


def mutate(path, before, after):
    """Makes a mutation. Gives back what the file was."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    if source.count(before) != 1:
        sys.exit(f"{path}: {before!r} stands there {source.count(before)} times")
    with open(path, "w", encoding="utf-8") as file:
        file.write(source.replace(before, after))
    return source


def tried(directory, tests, environment):
    """The first of the tests that fails, if one does."""
    for test in tests:
        code, said = run(["cargo", "test", "--locked", *test, "--no-run"], directory, environment, 900)
        if code != 0:
            sys.exit("it does not build:\n" + said)
        code, said = run(["cargo", "test", "--locked", *test], directory, environment, 900)
        if code != 0:
            lines = [line for line in said.splitlines() if "panicked" in line or " failed;" in line]
            return f"found by {test[-1].lstrip('-')}: {lines[0] if lines else 'it took too long'}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parser.add_argument("--seeds", default="1500", help="seeds of the simulation")
    parser.add_argument("--keep", help="the copy, which is made and stays")
    arguments = parser.parse_args()
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True, text=True, capture_output=True).stdout.strip()
    copy = arguments.keep or tempfile.mkdtemp(prefix="kurir-mutations-")
    os.makedirs(copy, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=top, check=True, capture_output=True).stdout
    # As new as they are unpacked, or cargo takes them for what it last built, which was mutated.
    subprocess.run(["tar", "-xm"], cwd=copy, input=archive, check=True)
    environment = {**os.environ, "KURIR_SEEDS": arguments.seeds, "RUST_BACKTRACE": "0", "RUSTFLAGS": "-Awarnings"}
    broken = tried(copy, [UNIT, SIMULATION, TAKEOVER, REPAIR, DISK], environment)
    if broken:
        sys.exit(f"without a mutation: {broken}")
    missed = 0
    for name, file, before, after, tests in MUTATIONS:
        if arguments.only not in name:
            continue
        path = os.path.join(copy, file)
        source = mutate(path, before, after)
        found = tried(copy, tests, environment)
        with open(path, "w", encoding="utf-8") as back:
            back.write(source)
        missed += found is None
        print(f"{name}: {found or 'NOT FOUND'}"[:240], flush=True)
    print(f"{missed} not found")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
