//! Password work: argon2id, done away from the loop, one job at a time.
//!
//! The parameters are OWASP's minimum for argon2id: 19 MiB, two passes, one lane. A hash is kept as a PHC string, which
//! names its own parameters, so that older ones stay readable.

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};

use crate::connection::ConnectionId;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// A password to check, a password to hash, or both: then the second only if the first is right.
pub struct PasswordJob {
    /// Who waits for it.
    pub connection: ConnectionId,
    /// A password and the hash it must fit; without a hash the answer is no, after the same work.
    pub check: Option<(String, Option<String>)>,
    /// A password to hash.
    pub hash: Option<String>,
}

/// What came of a [`PasswordJob`].
#[derive(Debug, PartialEq, Eq)]
pub struct PasswordDone {
    /// Who waits for it.
    pub connection: ConnectionId,
    /// The check was right, or there was none.
    pub passed: bool,
    /// The PHC string, where one was asked for and the check was right.
    pub hash: Option<String>,
}

/// Does password work.
pub struct Hasher {
    argon2: Argon2<'static>,
    /// A hash that no password fits, so that a user who does not exist costs what one who does costs.
    nobody: String,
}

/// The password functions are not usable on this machine.
#[derive(Debug)]
pub struct HashError(String);

impl std::fmt::Display for HashError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a password could not be hashed: {}", self.0)
    }
}

impl std::error::Error for HashError {}

impl Hasher {
    /// A hasher with this module's parameters.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn new() -> Result<Self, HashError> {
        let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(|error| HashError(error.to_string()))?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).map_err(|error| HashError(error.to_string()))?;
        let nobody = hash(&argon2, &secret)?;
        Ok(Self { argon2, nobody })
    }

    /// The PHC string of a password, with a fresh salt.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn hash(&self, password: &str) -> Result<String, HashError> {
        hash(&self.argon2, password.as_bytes())
    }

    /// Does one job.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn run(&self, job: &PasswordJob) -> Result<PasswordDone, HashError> {
        let passed = job.check.as_ref().is_none_or(|(password, hash)| self.fits(password, hash.as_deref()));
        let hash = match &job.hash {
            Some(password) if passed => Some(self.hash(password)?),
            _ => None,
        };
        Ok(PasswordDone { connection: job.connection, passed, hash })
    }

    fn fits(&self, password: &str, hash: Option<&str>) -> bool {
        let against = hash.unwrap_or(&self.nobody);
        let fits = PasswordHash::new(against)
            .is_ok_and(|parsed| self.argon2.verify_password(password.as_bytes(), &parsed).is_ok());
        fits && hash.is_some()
    }
}

fn hash(argon2: &Argon2<'_>, password: &[u8]) -> Result<String, HashError> {
    argon2.hash_password(password).map(|hash| hash.to_string()).map_err(|error| HashError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_fits_its_own_hash_and_nothing_fits_nobody() {
        let hasher = Hasher::new().unwrap();
        let hash = hasher.hash("surabaya").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(hasher.fits("surabaya", Some(&hash)));
        assert!(!hasher.fits("jakarta!", Some(&hash)));
        assert!(!hasher.fits("surabaya", None));
        assert!(!hasher.fits("surabaya", Some("not a hash")));
    }

    #[test]
    fn the_new_password_is_hashed_only_if_the_old_one_is_right() {
        let hasher = Hasher::new().unwrap();
        let old = hasher.hash("surabaya").unwrap();
        let job = |password: &str| PasswordJob {
            connection: ConnectionId::default(),
            check: Some((password.to_owned(), Some(old.clone()))),
            hash: Some("malang-raya".to_owned()),
        };
        assert!(hasher.run(&job("surabaya")).unwrap().hash.is_some());
        let refused = hasher.run(&job("surabaja")).unwrap();
        assert!(!refused.passed);
        assert_eq!(refused.hash, None);
    }
}
