//! The verb table: every request that exists, how it is spelt, what it takes, and who may make it.
//!
//! The parser, `HELP` and the usage in an error text all read this one table; [`crate::command`] gives each [`Verb`]
//! its meaning.

use std::fmt;

/// What is asked for, whichever way it was spelt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Auth,
    SendMessage,
    SendGroupMessage,
    SendFile,
    SendGroupFile,
    MyFile,
    Inbox,
    DownloadFile,
    Register,
    Logout,
    ChangePassword,
    CreateGroup,
    JoinGroup,
    LeaveGroup,
    AddMember,
    RemoveMember,
    MyGroup,
    DeleteFile,
    Ping,
    Help,
    UserAdd,
    UserList,
    UserPassword,
    UserRemove,
    GroupList,
    Backup,
}

/// Which keys a reply has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// The keys of the written protocol.
    Written,
    /// Those, and beside them the keys that the classic clients read.
    Classic,
}

/// Which connections a verb exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Everybody.
    Client,
    /// Whoever can open the admin socket.
    Admin,
}

/// What the last parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// A word like the others, or nothing where there are no parameters.
    Word,
    /// A word that may be missing.
    OptionalWord,
    /// The rest of the line, unchanged.
    Text,
    /// The rest of the line as base64, of any length; it is not part of the parsed request.
    Content,
}

/// How the case of a verb counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Any,
    Lower,
}

/// One row of the table.
#[derive(Debug)]
pub struct Spec {
    /// What it means.
    pub verb: Verb,
    /// Its words, as they are shown.
    words: &'static [&'static str],
    /// The names of its parameters, in order.
    pub parameters: &'static [&'static str],
    /// What the last of them is.
    pub last: Last,
    /// What the reply looks like.
    pub dialect: Dialect,
    /// Who may use it.
    pub audience: Audience,
    case: Case,
}

impl Spec {
    /// The request in its shown form, as in `SEND MESSAGE token user text`.
    #[must_use]
    pub const fn usage(&'static self) -> Usage {
        Usage(self)
    }

    const fn new(verb: Verb, words: &'static [&'static str], parameters: &'static [&'static str], last: Last) -> Self {
        Self { verb, words, parameters, last, dialect: Dialect::Written, audience: Audience::Client, case: Case::Any }
    }

    const fn classic(mut self) -> Self {
        self.dialect = Dialect::Classic;
        self
    }

    const fn lower(mut self) -> Self {
        self.case = Case::Lower;
        self
    }

    const fn admin(mut self) -> Self {
        self.audience = Audience::Admin;
        self
    }
}

/// Shows a [`Spec`] as a person would type it.
#[derive(Clone, Copy, Debug)]
pub struct Usage(&'static Spec);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(spec) = self;
        f.write_str(&spec.words.join(" "))?;
        for (index, parameter) in spec.parameters.iter().enumerate() {
            if spec.last == Last::OptionalWord && index + 1 == spec.parameters.len() {
                write!(f, " [{parameter}]")?;
            } else {
                write!(f, " {parameter}")?;
            }
        }
        Ok(())
    }
}

/// The table. Rows are tried in order, so the most frequent stand first, and `send` stands behind the verbs that it
/// begins: `send message …` is the written protocol in lower case, any other `send …` the classic spelling.
pub static SPECS: [Spec; 34] = [
    Spec::new(Verb::SendMessage, &["SEND", "MESSAGE"], &["token", "user", "text"], Last::Text),
    Spec::new(Verb::SendGroupMessage, &["SEND", "GROUP", "MESSAGE"], &["token", "group", "text"], Last::Text),
    Spec::new(Verb::SendFile, &["SEND", "FILE"], &["token", "user", "name", "base64"], Last::Content),
    Spec::new(Verb::SendGroupFile, &["SEND", "GROUP", "FILE"], &["token", "group", "name", "base64"], Last::Content),
    Spec::new(Verb::Inbox, &["inbox"], &["token"], Last::Word).classic().lower(),
    Spec::new(Verb::Inbox, &["INBOX"], &["token"], Last::Word),
    Spec::new(Verb::MyFile, &["MY", "FILE"], &["token"], Last::Word),
    Spec::new(Verb::DownloadFile, &["DOWNLOAD", "FILE"], &["token", "user", "name"], Last::Word),
    Spec::new(Verb::Auth, &["auth"], &["user", "password"], Last::Word).classic().lower(),
    Spec::new(Verb::Auth, &["AUTH"], &["user", "password"], Last::Word),
    Spec::new(Verb::SendMessage, &["send"], &["token", "user", "text"], Last::Text).classic().lower(),
    Spec::new(Verb::SendGroupMessage, &["send_group"], &["token", "group", "text"], Last::Text).classic(),
    Spec::new(Verb::SendFile, &["send_file"], &["token", "user", "name", "base64"], Last::Content).classic(),
    Spec::new(Verb::SendGroupFile, &["send_group_file"], &["token", "group", "name", "base64"], Last::Content)
        .classic(),
    Spec::new(Verb::MyFile, &["my_file"], &["token"], Last::Word).classic(),
    Spec::new(Verb::DownloadFile, &["download_file"], &["token", "user", "name"], Last::Word).classic(),
    Spec::new(Verb::Register, &["REGISTER"], &["user", "password"], Last::Word),
    Spec::new(Verb::Logout, &["LOGOUT"], &["token"], Last::Word),
    Spec::new(Verb::ChangePassword, &["CHANGE", "PASSWORD"], &["token", "old", "new"], Last::Word),
    Spec::new(Verb::CreateGroup, &["CREATE", "GROUP"], &["token", "group", "secret"], Last::OptionalWord),
    Spec::new(Verb::JoinGroup, &["JOIN", "GROUP"], &["token", "group", "secret"], Last::OptionalWord),
    Spec::new(Verb::LeaveGroup, &["LEAVE", "GROUP"], &["token", "group"], Last::Word),
    Spec::new(Verb::AddMember, &["ADD", "MEMBER"], &["token", "group", "user"], Last::Word),
    Spec::new(Verb::RemoveMember, &["REMOVE", "MEMBER"], &["token", "group", "user"], Last::Word),
    Spec::new(Verb::MyGroup, &["MY", "GROUP"], &["token"], Last::Word),
    Spec::new(Verb::DeleteFile, &["DELETE", "FILE"], &["token", "user", "name"], Last::Word),
    Spec::new(Verb::Ping, &["PING"], &[], Last::Word),
    Spec::new(Verb::Help, &["HELP"], &[], Last::Word),
    Spec::new(Verb::UserAdd, &["USER", "ADD"], &["user", "password"], Last::Word).admin(),
    Spec::new(Verb::UserList, &["USER", "LIST"], &[], Last::Word).admin(),
    Spec::new(Verb::UserPassword, &["USER", "PASSWORD"], &["user", "password"], Last::Word).admin(),
    Spec::new(Verb::UserRemove, &["USER", "REMOVE"], &["user"], Last::Word).admin(),
    Spec::new(Verb::GroupList, &["GROUP", "LIST"], &[], Last::Word).admin(),
    Spec::new(Verb::Backup, &["BACKUP"], &[], Last::Word).admin(),
];

/// The row that `line` begins with, and what follows the verb (with the blank in front, if there is one).
#[must_use]
pub fn recognise(line: &[u8], audience: Audience) -> Option<(&'static Spec, &[u8])> {
    // Nearly all that comes to a busy server is this, spelt like this.
    if line.starts_with(b"SEND MESSAGE ") {
        return SPECS.first().map(|spec| (spec, &line[b"SEND MESSAGE".len()..]));
    }
    let first = line.first()?.to_ascii_uppercase();
    SPECS.iter().find_map(|spec| {
        let is_elsewhere = spec.audience == Audience::Admin && audience != Audience::Admin;
        if is_elsewhere || !spec.words[0].as_bytes()[0].eq_ignore_ascii_case(&first) {
            return None;
        }
        after_words(line, spec).map(|rest| (spec, rest))
    })
}

/// The rows that `HELP` shows.
pub fn shown(audience: Audience) -> impl Iterator<Item = &'static Spec> {
    let order = |spec: &&Spec| spec.verb as usize;
    let mut specs: Vec<&'static Spec> = SPECS
        .iter()
        .filter(|spec| spec.dialect == Dialect::Written)
        .filter(|spec| spec.audience == Audience::Client || audience == Audience::Admin)
        .collect();
    specs.sort_by_key(order);
    specs.into_iter()
}

/// What is left of `line` behind the words of `spec`, each ended by a blank or the end of the line.
fn after_words<'a>(line: &'a [u8], spec: &Spec) -> Option<&'a [u8]> {
    let mut rest = line;
    for (index, word) in spec.words.iter().enumerate() {
        if index > 0 {
            let blanks = rest.iter().take_while(|&&byte| byte == b' ').count();
            rest = &rest[blanks..];
        }
        let (found, after) = rest.split_at_checked(word.len())?;
        let same = match spec.case {
            Case::Any => found.eq_ignore_ascii_case(word.as_bytes()),
            Case::Lower => found == word.as_bytes(),
        };
        if !same || after.first().is_some_and(|&byte| byte != b' ') {
            return None;
        }
        rest = after;
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> Option<(Verb, Dialect)> {
        recognise(line.as_bytes(), Audience::Client).map(|(spec, _)| (spec.verb, spec.dialect))
    }

    #[test]
    fn a_verb_is_recognised_in_any_case_and_with_several_blanks() {
        for line in ["SEND MESSAGE a b c", "send message a b c", "Send   mEssage"] {
            assert_eq!(found(line), Some((Verb::SendMessage, Dialect::Written)), "{line}");
        }
    }

    #[test]
    fn the_case_tells_the_two_spellings_apart_where_the_word_is_the_same() {
        assert_eq!(found("AUTH a b"), Some((Verb::Auth, Dialect::Written)));
        assert_eq!(found("Auth a b"), Some((Verb::Auth, Dialect::Written)));
        assert_eq!(found("auth a b"), Some((Verb::Auth, Dialect::Classic)));
        assert_eq!(found("INBOX a"), Some((Verb::Inbox, Dialect::Written)));
        assert_eq!(found("inbox a"), Some((Verb::Inbox, Dialect::Classic)));
        assert_eq!(found("send 00 henderson hi"), Some((Verb::SendMessage, Dialect::Classic)));
        assert_eq!(found("SEND 00 henderson hi"), None);
        assert_eq!(found("SEND_GROUP 00 group1 hi"), Some((Verb::SendGroupMessage, Dialect::Classic)));
    }

    #[test]
    fn the_row_that_is_looked_at_before_the_table_is_its_first() {
        assert_eq!((SPECS[0].verb, SPECS[0].dialect), (Verb::SendMessage, Dialect::Written));
        let (spec, rest) = recognise(b"SEND MESSAGE  a b c", Audience::Client).unwrap();
        assert_eq!((spec.verb, rest), (Verb::SendMessage, &b"  a b c"[..]));
    }

    #[test]
    fn a_word_must_end_where_the_verb_ends() {
        assert_eq!(found("PINGPONG"), None);
        assert_eq!(found("SENDMESSAGE a b c"), None);
        assert_eq!(found("SEND MESSAGES a b c"), None);
        assert_eq!(found("sender"), None);
        assert_eq!(found(""), None);
    }

    #[test]
    fn the_verbs_of_the_administrator_exist_on_the_admin_socket_alone() {
        assert_eq!(found("USER LIST"), None);
        assert!(recognise(b"USER LIST", Audience::Admin).is_some());
        assert!(shown(Audience::Client).all(|spec| spec.audience == Audience::Client));
    }

    #[test]
    fn usage_names_every_parameter() {
        let usages: Vec<String> = shown(Audience::Client).map(|spec| spec.usage().to_string()).collect();
        assert_eq!(usages[0], "AUTH user password");
        assert!(usages.contains(&"SEND GROUP FILE token group name base64".to_owned()));
        assert!(usages.contains(&"CREATE GROUP token group [secret]".to_owned()));
        assert_eq!(usages.len(), 20);
    }
}
