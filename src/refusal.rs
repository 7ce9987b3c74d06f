//! Every reason for which a request is answered with ERROR, and its text in the protocol's language.
//!
//! A client can rely on the texts. The command line shows the English ones.

use std::fmt;

use crate::verb::Spec;

/// Why a request was refused.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Refusal {
    UnknownRequest,
    /// Too few parameters.
    Incomplete(&'static Spec),
    /// Too many parameters.
    Excess(&'static Spec),
    NotUtf8,
    LineTooLong,
    WrongPassword,
    /// Too many tries; seconds until the next may succeed.
    Throttled(u64),
    InvalidToken,
    NoSuchUser,
    NoSuchGroup,
    NotMember,
    NotOwner,
    AlreadyMember,
    WrongSecret,
    GroupFull,
    /// The user is a member of as many as it may.
    TooManyGroups,
    NameTaken,
    InvalidName,
    InvalidPassword,
    InvalidFileName,
    InvalidBase64,
    NoSuchFile,
    /// The most bytes that a file may have.
    FileTooLarge(u64),
    QuotaFull,
    MailboxFull,
    MailboxUnreadable,
    RegistrationClosed,
    ServerFull,
    ServerBusy,
    StorageFull,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Incomplete(spec) => write!(f, "parameter tidak lengkap: {}", spec.usage()),
            Self::Excess(spec) => write!(f, "parameter berlebih: {}", spec.usage()),
            Self::Throttled(seconds) => write!(f, "terlalu banyak percobaan, coba lagi dalam {seconds} detik"),
            Self::FileTooLarge(bytes) => write!(f, "file terlalu besar: maksimum {bytes} byte"),
            _ => f.write_str(self.fixed_texts().0),
        }
    }
}

impl Refusal {
    /// The English words for a text that a server sent, or that text where it is none of ours.
    #[must_use]
    pub fn in_english(text: &str) -> &str {
        FIXED.iter().map(Self::fixed_texts).find(|(indonesian, _)| *indonesian == text).map_or(text, |(_, words)| words)
    }

    /// The texts that hold no number and no usage: in the protocol's language and in English.
    fn fixed_texts(&self) -> (&'static str, &'static str) {
        match self {
            Self::UnknownRequest => ("request tidak dikenali", "the server does not know this request"),
            Self::NotUtf8 => ("request bukan UTF-8", "the request is not UTF-8"),
            Self::LineTooLong => ("request terlalu panjang", "the request is too long"),
            Self::WrongPassword => ("username atau password salah", "wrong user name or password"),
            Self::InvalidToken => ("token tidak valid", "the token is not valid"),
            Self::NoSuchUser => ("user tujuan tidak ditemukan", "there is no such user"),
            Self::NoSuchGroup => ("group tujuan tidak ditemukan", "there is no such group"),
            Self::NotMember => ("bukan anggota group", "not a member of this group"),
            Self::NotOwner => ("bukan pemilik group", "not the owner of this group"),
            Self::AlreadyMember => ("sudah menjadi anggota", "already a member of this group"),
            Self::WrongSecret => ("sandi group salah", "wrong group secret"),
            Self::GroupFull => ("group penuh", "the group has as many members as it may"),
            Self::TooManyGroups => ("terlalu banyak group", "the user is a member of as many groups as it may"),
            Self::NameTaken => ("nama sudah dipakai", "this name is taken"),
            Self::InvalidName => {
                ("nama tidak valid", "a name is 1 to 32 letters, digits, dots, underscores or hyphens")
            }
            Self::InvalidPassword => ("password tidak valid", "a password is 8 to 128 bytes without a blank"),
            Self::InvalidFileName => ("nama file tidak valid", "this file name is not allowed"),
            Self::InvalidBase64 => ("base64 tidak valid", "the content is not base64"),
            Self::NoSuchFile => ("file tidak ditemukan", "there is no such file"),
            Self::QuotaFull => ("kuota penyimpanan penuh", "the user's storage quota is used up"),
            Self::MailboxFull => ("kotak masuk tujuan penuh", "the mailbox is full"),
            Self::MailboxUnreadable => ("kotak masuk tidak terbaca", "the mailbox cannot be read from the disk"),
            Self::RegistrationClosed => ("pendaftaran ditutup", "registration is closed"),
            Self::ServerFull => ("server penuh", "the server is full"),
            Self::ServerBusy => ("server sibuk, coba lagi", "the server is busy, try again"),
            Self::StorageFull => ("penyimpanan server penuh", "the server's disk is full"),
            Self::Incomplete(_) => ("parameter tidak lengkap", "a parameter is missing"),
            Self::Excess(_) => ("parameter berlebih", "there are too many parameters"),
            Self::Throttled(_) => ("terlalu banyak percobaan", "too many tries"),
            Self::FileTooLarge(_) => ("file terlalu besar", "the file is too large"),
        }
    }
}

/// Those whose text never changes.
const FIXED: [Refusal; 26] = [
    Refusal::UnknownRequest,
    Refusal::NotUtf8,
    Refusal::LineTooLong,
    Refusal::WrongPassword,
    Refusal::InvalidToken,
    Refusal::NoSuchUser,
    Refusal::NoSuchGroup,
    Refusal::NotMember,
    Refusal::NotOwner,
    Refusal::AlreadyMember,
    Refusal::WrongSecret,
    Refusal::GroupFull,
    Refusal::TooManyGroups,
    Refusal::NameTaken,
    Refusal::InvalidName,
    Refusal::InvalidPassword,
    Refusal::InvalidFileName,
    Refusal::InvalidBase64,
    Refusal::NoSuchFile,
    Refusal::QuotaFull,
    Refusal::MailboxFull,
    Refusal::MailboxUnreadable,
    Refusal::RegistrationClosed,
    Refusal::ServerFull,
    Refusal::ServerBusy,
    Refusal::StorageFull,
];
