//! What a client keeps between runs, in the user's state directory: a login for each profile, and the histories.
//!
//! Everything there is for its owner alone: the directory is 0700, the files 0600. A token stands in for a password, so the
//! password itself is never kept.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;
use serde_json::{Value, json};

/// Where a client keeps things: `$XDG_STATE_HOME/kurir`, which is mostly `~/.local/state/kurir`.
///
/// # Errors
/// There is no home directory.
pub fn state_directory() -> io::Result<PathBuf> {
    let base = etcetera::base_strategy::Xdg::new().map_err(io::Error::other)?;
    let state = base.state_dir().unwrap_or_else(|| base.home_dir().join(".local/state"));
    Ok(state.join("kurir"))
}

/// A login that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// `HOST:PORT`
    pub server: String,
    /// Whose it is.
    pub user: String,
    /// What the server knows it by.
    pub token: String,
}

/// The logins that are kept, each in a file named for its profile.
#[derive(Clone, Debug)]
pub struct Profiles {
    directory: PathBuf,
}

impl Profiles {
    /// Those of a state directory, which need not be there yet.
    #[must_use]
    pub fn new(state: &Path) -> Self {
        Self { directory: state.join("logins") }
    }

    /// The login of a profile, if there is one.
    ///
    /// # Errors
    /// Its file cannot be read, or is not what [`Self::save`] writes.
    pub fn load(&self, profile: &str) -> io::Result<Option<Login>> {
        let text = match fs::read_to_string(self.path(profile)?) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let login: Value = serde_json::from_str(&text)?;
        let text = |key: &str| login[key].as_str().map(ToOwned::to_owned);
        match (text("server"), text("user"), text("token")) {
            (Some(server), Some(user), Some(token)) => Ok(Some(Login { server, user, token })),
            _ => Err(io::Error::new(ErrorKind::InvalidData, format!("the login of profile {profile} is damaged"))),
        }
    }

    /// Keeps the login of a profile, in place of the one before: as a whole or not at all.
    ///
    /// # Errors
    /// What the disk said.
    pub fn save(&self, profile: &str, login: &Login) -> io::Result<()> {
        let path = self.path(profile)?;
        make_private(&self.directory)?;
        let new = path.with_extension("new");
        let Login { server, user, token } = login;
        let text = json!({ "server": server, "user": user, "token": token }).to_string();
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(new, path)
    }

    /// Forgets the login of a profile.
    ///
    /// # Errors
    /// What the disk said.
    pub fn forget(&self, profile: &str) -> io::Result<()> {
        match fs::remove_file(self.path(profile)?) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, profile: &str) -> io::Result<PathBuf> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if profile.is_empty() || !profile.bytes().all(is_allowed) {
            let rule = "the name of a profile is letters, digits, underscores and hyphens";
            return Err(io::Error::new(ErrorKind::InvalidInput, rule));
        }
        Ok(self.directory.join(format!("{profile}.json")))
    }
}

/// Makes a directory for its owner alone, if it is not there.
pub(crate) fn make_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_login_comes_back_and_is_for_its_owner_alone() {
        let state = tempfile::tempdir().unwrap();
        let profiles = Profiles::new(&state.path().join("kurir"));
        assert_eq!(profiles.load("one").unwrap(), None);
        let login = |user: &str| Login { server: "[::1]:8889".into(), user: user.into(), token: "0f".repeat(16) };
        profiles.save("one", &login("messi")).unwrap();
        profiles.save("two", &login("henderson")).unwrap();
        profiles.save("one", &login("lineker")).unwrap();
        assert_eq!(profiles.load("one").unwrap(), Some(login("lineker")));
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(profiles.directory.clone()), 0o700);
        assert_eq!(mode(profiles.path("one").unwrap()), 0o600);
        profiles.forget("one").unwrap();
        profiles.forget("one").unwrap();
        assert_eq!(profiles.load("one").unwrap(), None);
        assert_eq!(profiles.load("two").unwrap(), Some(login("henderson")));
    }

    #[test]
    fn a_profile_does_not_lead_elsewhere_and_a_damaged_one_says_so() {
        let state = tempfile::tempdir().unwrap();
        let profiles = Profiles::new(state.path());
        for name in ["", "../one", "a/b", ".", "a.b"] {
            assert_eq!(profiles.load(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
        }
        make_private(&profiles.directory).unwrap();
        for text in ["", "{}", "{\"server\":1}"] {
            fs::write(profiles.directory.join("one.json"), text).unwrap();
            assert!(profiles.load("one").is_err(), "{text}");
        }
    }
}
