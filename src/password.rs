//! Password work: argon2id, done away from the loop, one job at a time.
//!
//! The parameters are OWASP's minimum for argon2id: 19 MiB, two passes, one lane. A hash is kept as a PHC string, which
//! names its own parameters, so that older ones stay readable.

use argon2::password_hash::phc::{Output, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Block, Params, Version};

use crate::connection::ConnectionId;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
const SALT_BYTES: usize = 16;

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

/// Does password work, all of it in the same memory.
pub struct Hasher {
    params: Params,
    memory: Vec<Block>,
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

impl HashError {
    fn new(error: &impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

impl Hasher {
    /// A hasher with this module's parameters.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn new() -> Result<Self, HashError> {
        let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(|error| HashError::new(&error))?;
        let mut hasher = Self { params, memory: Vec::new(), nobody: String::new() };
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).map_err(|error| HashError::new(&error))?;
        hasher.nobody = hasher.hash(&format!("{:032x}", u128::from_ne_bytes(secret)))?;
        Ok(hasher)
    }

    /// The PHC string of a password, with a fresh salt.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn hash(&mut self, password: &str) -> Result<String, HashError> {
        let mut salt = [0; SALT_BYTES];
        getrandom::fill(&mut salt).map_err(|error| HashError::new(&error))?;
        let salt = Salt::new(&salt).map_err(|error| HashError::new(&error))?;
        let params = self.params.clone();
        let hash = PasswordHash {
            algorithm: Algorithm::Argon2id.ident(),
            version: Some(Version::V0x13.into()),
            params: (&params).try_into().map_err(|error| HashError::new(&error))?,
            salt: Some(salt),
            hash: Some(self.derive(params, password, &salt)?),
        };
        Ok(hash.to_string())
    }

    /// Does one job.
    ///
    /// # Errors
    /// [`HashError`] when there is no randomness.
    pub fn run(&mut self, job: &PasswordJob) -> Result<PasswordDone, HashError> {
        let passed = match &job.check {
            Some((password, hash)) => self.fits(password, hash.as_deref())?,
            None => true,
        };
        let hash = match &job.hash {
            Some(password) if passed => Some(self.hash(password)?),
            _ => None,
        };
        Ok(PasswordDone { connection: job.connection, passed, hash })
    }

    /// Whether a password fits a hash; without a hash the answer is no, after the same work.
    ///
    /// # Errors
    /// [`HashError`] when it is no hash.
    pub fn fits(&mut self, password: &str, hash: Option<&str>) -> Result<bool, HashError> {
        let known = PasswordHash::new(hash.unwrap_or(&self.nobody)).map_err(|error| HashError::new(&error))?;
        let params = Params::try_from(&known).map_err(|error| HashError::new(&error))?;
        let salt = known.salt.ok_or_else(|| HashError::new(&"a stored hash has no salt"))?;
        // The comparison takes the same time wherever the two differ.
        let fits = known.hash == Some(self.derive(params, password, &salt)?);
        Ok(fits && hash.is_some())
    }

    fn derive(&mut self, params: Params, password: &str, salt: &Salt) -> Result<Output, HashError> {
        let mut bytes = [0; Params::DEFAULT_OUTPUT_LEN];
        self.memory.resize(params.block_count(), Block::default());
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into_with_memory(password.as_bytes(), salt, &mut bytes, &mut self.memory)
            .map_err(|error| HashError::new(&error))?;
        Output::new(&bytes).map_err(|error| HashError::new(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_fits_its_own_hash_and_nothing_fits_nobody() {
        let mut hasher = Hasher::new().unwrap();
        let hash = hasher.hash("surabaya").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(hasher.fits("surabaya", Some(&hash)).unwrap());
        assert!(!hasher.fits("jakarta!", Some(&hash)).unwrap());
        assert!(!hasher.fits("surabaya", None).unwrap());
        assert!(hasher.fits("surabaya", Some("not a hash")).is_err());
    }

    #[test]
    fn a_user_who_does_not_exist_takes_the_same_work() {
        let mut hasher = Hasher::new().unwrap();
        let known = hasher.hash("surabaya").unwrap();
        for hash in [None, Some(known.as_str())] {
            hasher.memory.fill(Block::default());
            assert!(!hasher.fits("jakarta!", hash).unwrap());
            let filled = hasher.memory.iter().filter(|block| block.as_ref().iter().any(|word| *word != 0)).count();
            assert_eq!(filled, MEMORY_KIB as usize, "every block of memory is worked through");
        }
    }

    #[test]
    fn the_new_password_is_hashed_only_if_the_old_one_is_right() {
        let mut hasher = Hasher::new().unwrap();
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
