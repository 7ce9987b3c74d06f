//! The engine's helpers in memory, for what is measured without a disk.

use std::convert::Infallible;

use kurir::engine::{Completion, Job};
use kurir::local::Workers;
use kurir::password::PasswordDone;

/// Everything is durable at once, and every password is right.
pub(crate) struct AtOnce;

impl Workers for AtOnce {
    type Error = Infallible;

    fn run(&mut self, job: Job, mut report: impl FnMut(Completion)) -> Result<(), Infallible> {
        match job {
            Job::Journal(mut batch) => {
                batch.seal();
                let synced = batch.end();
                report(Completion::Settled { batch, synced });
            }
            Job::Password(job) => {
                let hash = job.hash.map(|_| String::new());
                report(Completion::Password(PasswordDone { connection: job.connection, passed: true, hash }));
            }
            // All is in memory, and there is no end of room.
            Job::File(_) | Job::Texts(_) | Job::Space(_) | Job::Compact(_) => {}
        }
        Ok(())
    }
}
