//! Every bound of the server in one place: its name with its unit, its default, and the flag that sets it.
//!
//! The command line is derived from this type, so `serve --help` lists exactly these. (How much is done or kept at a time
//! where it makes no difference to anybody outside is a constant beside the code that does it.)

use clap::Args;

use crate::aligned::BLOCK_BYTES;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;
const TIB: u64 = 1024 * GIB;
/// A line must hold any request but for its text,
const LINE_BYTES_LEAST: u64 = KIB;
/// and must find room in the journal at once.
const LINE_BYTES_MOST: u64 = MIB;

/// A segment holds several of the longest lines,
const SEGMENT_BYTES_LEAST: u64 = 256 * KIB;
/// and is made in a moment.
const SEGMENT_BYTES_MOST: u64 = GIB;

/// One file takes so much of the answer to MY FILE at most: a name of up to 255 bytes, each of which may be written as two, and
/// the other party's.
pub(crate) const FILE_LISTED_BYTES_MAX: usize = 600;
/// And one member of the answer to MY GROUP.
pub(crate) const MEMBER_LISTED_BYTES_MAX: usize = 36;

/// The bounds that the engine and the network keep.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Connections at once; `fit` is as many as the file descriptor limit allows, which is raised as far as it goes
    #[arg(long, env = "KURIR_CONNECTIONS_MAX", value_name = "N", value_parser = count_or_fit, default_value = "fit")]
    pub connections_max: usize,

    /// Connections at once from one address (a /64 of IPv6), and never more than half of all; loopback is not counted
    #[arg(long, env = "KURIR_CONNECTIONS_PER_ADDRESS_MAX", value_name = "N", default_value_t = 1000)]
    pub connections_per_address_max: usize,

    /// Connections at once to the admin socket; they come on top of the others
    #[arg(long, env = "KURIR_ADMIN_CONNECTIONS_MAX", value_name = "N", default_value_t = 16)]
    pub admin_connections_max: usize,

    /// What is counted for each address is counted for loopback addresses too; with a proxy in front they are everybody's
    #[arg(long, env = "KURIR_LIMIT_LOOPBACK", value_parser = clap::builder::BoolishValueParser::new())]
    pub limit_loopback: bool,

    /// Connections accepted in one turn of the loop
    #[arg(long, env = "KURIR_ACCEPTS_PER_TURN_MAX", value_name = "N", default_value_t = 64)]
    pub accepts_per_turn_max: usize,

    /// Connections that are one too many and still let read `server penuh`, at once and new ones a turn; any more are closed
    /// without waiting for that
    #[arg(long, env = "KURIR_TURNED_AWAY_MAX", value_name = "N", default_value_t = 32)]
    pub turned_away_max: usize,

    /// Requests of one connection served in one turn of the loop
    #[arg(long, env = "KURIR_REQUESTS_PER_TURN_MAX", value_name = "N", default_value_t = 512)]
    pub requests_per_turn_max: usize,

    /// Bytes of one connection read, and of answers made for it, in one turn of the loop
    #[arg(long, env = "KURIR_READ_BYTES_PER_TURN_MAX", value_name = "BYTES", value_parser = bytes, default_value = "256KiB")]
    pub read_bytes_per_turn_max: u64,

    /// Bytes of all connections together read, and of answers made for them, in one turn of the loop
    #[arg(long, env = "KURIR_BYTES_PER_TURN_MAX", value_name = "BYTES", value_parser = bytes, default_value = "1MiB")]
    pub bytes_per_turn_max: u64,

    /// A request line without its line end (the content of a file does not count)
    #[arg(long, env = "KURIR_LINE_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "64KiB")]
    pub line_bytes_max: u64,

    /// What is thrown away of a line that is too long before the connection is closed; for a file that was refused, the size
    /// of the longest file comes on top
    #[arg(long, env = "KURIR_DISCARD_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "16MiB")]
    pub discard_bytes_max: u64,

    /// Output waiting for one peer at which no more of its requests are served until it reads
    #[arg(long, env = "KURIR_OUTPUT_BYTES_HIGH", value_name = "BYTES", value_parser = bytes, default_value = "1MiB")]
    pub output_bytes_high: u64,

    /// Output waiting for one peer at which it is closed at once
    #[arg(long, env = "KURIR_OUTPUT_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "32MiB")]
    pub output_bytes_max: u64,

    /// Memory that all connections hold together; past it those are closed that have kept the server waiting longest,
    /// strangers first, and long answers and files are refused for a moment
    #[arg(long, env = "KURIR_CONNECTIONS_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "256MiB")]
    pub connections_bytes_max: u64,

    /// Time between two requests; 0 for no limit, here and for the next four
    #[arg(long, env = "KURIR_IDLE_MS_MAX", value_name = "MS", default_value_t = 1_800_000)]
    pub idle_ms_max: u64,

    /// Time to the first complete request
    #[arg(long, env = "KURIR_FIRST_REQUEST_MS_MAX", value_name = "MS", default_value_t = 60_000)]
    pub first_request_ms_max: u64,

    /// Time to the first token that is good, or AUTH that gives one, whatever else comes before
    #[arg(long, env = "KURIR_AUTH_MS_MAX", value_name = "MS", default_value_t = 120_000)]
    pub auth_ms_max: u64,

    /// Time for a request line that has begun, or for each 64 KiB of a file
    #[arg(long, env = "KURIR_LINE_MS_MAX", value_name = "MS", default_value_t = 60_000)]
    pub line_ms_max: u64,

    /// Time for a peer to read what waits for it, or 64 KiB of that; up to four times as long after more was read at once
    #[arg(long, env = "KURIR_OUTPUT_MS_MAX", value_name = "MS", default_value_t = 60_000)]
    pub output_ms_max: u64,

    /// Messages in one INBOX reply
    #[arg(long, env = "KURIR_INBOX_MESSAGES_MAX", value_name = "N", default_value_t = 10_000)]
    pub inbox_messages_max: usize,

    /// Size of one INBOX reply
    #[arg(long, env = "KURIR_INBOX_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "8MiB")]
    pub inbox_bytes_max: u64,

    /// Messages waiting in one mailbox
    #[arg(long, env = "KURIR_MAILBOX_MESSAGES_MAX", value_name = "N", default_value_t = 100_000)]
    pub mailbox_messages_max: usize,

    /// Messages waiting in all mailboxes together; a mailbox that has 100 takes no more than there are places left for all
    #[arg(long, env = "KURIR_MESSAGES_MAX", value_name = "N", default_value_t = 20_000_000)]
    pub messages_max: usize,

    /// Size of the messages waiting in one mailbox, as they are stored: text, names and some 30 bytes each
    #[arg(long, env = "KURIR_MAILBOX_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "256MiB")]
    pub mailbox_bytes_max: u64,

    /// One file, decoded
    #[arg(long, env = "KURIR_FILE_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "1GiB")]
    pub file_bytes_max: u64,

    /// A file of at most this size is kept in the journal, others in a file of their own; half of a line at most
    #[arg(long, env = "KURIR_SMALL_FILE_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "16KiB")]
    pub small_file_bytes_max: u64,

    /// Files that one user has sent and that somebody still lists
    #[arg(long, env = "KURIR_USER_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "10GiB")]
    pub user_bytes_max: u64,

    /// How many files that is; an empty one takes room too
    #[arg(long, env = "KURIR_USER_FILES_MAX", value_name = "N", default_value_t = 10_000)]
    pub user_files_max: usize,

    /// All stored files together
    #[arg(long, env = "KURIR_FILES_BYTES_MAX", value_name = "BYTES", value_parser = bytes, default_value = "1TiB")]
    pub files_bytes_max: u64,

    /// Files in one user's list, sent and received, at which nobody else can send it more
    #[arg(long, env = "KURIR_LISTED_FILES_MAX", value_name = "N", default_value_t = 20_000)]
    pub listed_files_max: usize,

    /// Uploads at once; each holds at most 256 KiB of memory
    #[arg(long, env = "KURIR_UPLOADS_MAX", value_name = "N", default_value_t = 256)]
    pub uploads_max: usize,

    /// Downloads at once; each holds an open file
    #[arg(long, env = "KURIR_DOWNLOADS_MAX", value_name = "N", default_value_t = 256)]
    pub downloads_max: usize,

    /// Uploads and downloads of one user at once, and of either never as many as places are left
    #[arg(long, env = "KURIR_TRANSFERS_PER_USER_MAX", value_name = "N", default_value_t = 32)]
    pub transfers_per_user_max: usize,

    /// INBOX replies and small files that wait to be read from the disk
    #[arg(long, env = "KURIR_READ_QUEUE_MAX", value_name = "N", default_value_t = 64)]
    pub read_queue_max: usize,

    /// The same of one user
    #[arg(long, env = "KURIR_READ_QUEUE_PER_USER_MAX", value_name = "N", default_value_t = 8)]
    pub read_queue_per_user_max: usize,

    /// INBOX replies of one user on their way at once
    #[arg(long, env = "KURIR_INBOXES_PER_USER_MAX", value_name = "N", default_value_t = 1000)]
    pub inboxes_per_user_max: usize,

    /// Logins and other password work waiting at once
    #[arg(long, env = "KURIR_PASSWORD_QUEUE_MAX", value_name = "N", default_value_t = 64)]
    pub password_queue_max: usize,

    /// The same from one address; loopback is not counted
    #[arg(long, env = "KURIR_PASSWORD_QUEUE_PER_ADDRESS_MAX", value_name = "N", default_value_t = 16)]
    pub password_queue_per_address_max: usize,

    /// Wrong passwords for one account from one address before it must wait: a second, and twice as long each time
    #[arg(long, env = "KURIR_LOGIN_FAILURES_MAX", value_name = "N", default_value_t = 5)]
    pub login_failures_max: u32,

    /// The same from one address for all accounts together; loopback is not counted
    #[arg(long, env = "KURIR_LOGIN_FAILURES_PER_ADDRESS_MAX", value_name = "N", default_value_t = 50)]
    pub login_failures_per_address_max: u32,

    /// The longest such wait; in so long one failure is forgotten, and ten of those of an address
    #[arg(long, env = "KURIR_LOGIN_DELAY_MS_MAX", value_name = "MS", default_value_t = 900_000)]
    pub login_delay_ms_max: u64,

    /// Addresses and users counted at once for each of failures, new accounts and new groups; past it the oldest failures
    /// are forgotten, and new accounts and groups must wait
    #[arg(long, env = "KURIR_COUNTED_MAX", value_name = "N", default_value_t = 65_536)]
    pub counted_max: usize,

    /// Accounts that one address may make a minute, or names that it may ask for; 0 for no limit, as with --demo
    #[arg(
        long,
        env = "KURIR_REGISTRATIONS_PER_MINUTE_MAX",
        value_name = "N",
        default_value = "10",
        default_value_if("demo", "true", "0")
    )]
    pub registrations_per_minute_max: u32,

    /// Tokens that one user holds; a new login past it ends the token used longest ago
    #[arg(long, env = "KURIR_TOKENS_PER_USER_MAX", value_name = "N", default_value_t = 100)]
    pub tokens_per_user_max: usize,

    /// Accounts
    #[arg(long, env = "KURIR_USERS_MAX", value_name = "N", default_value_t = 1_000_000)]
    pub users_max: usize,

    /// Groups
    #[arg(long, env = "KURIR_GROUPS_MAX", value_name = "N", default_value_t = 1_000_000)]
    pub groups_max: usize,

    /// Groups that one user is a member of
    #[arg(long, env = "KURIR_GROUPS_PER_USER_MAX", value_name = "N", default_value_t = 100)]
    pub groups_per_user_max: usize,

    /// Members of one group
    #[arg(long, env = "KURIR_MEMBERS_PER_GROUP_MAX", value_name = "N", default_value_t = 5000)]
    pub members_per_group_max: usize,

    /// Groups that one user may make a minute; 0 for no limit
    #[arg(long, env = "KURIR_GROUPS_PER_MINUTE_MAX", value_name = "N", default_value_t = 10)]
    pub groups_per_minute_max: u32,

    /// The same for one address
    #[arg(long, env = "KURIR_GROUPS_PER_MINUTE_PER_ADDRESS_MAX", value_name = "N", default_value_t = 100)]
    pub groups_per_minute_per_address_max: u32,

    /// One segment of the journal, which is made before it is needed; it counts when a data directory is begun
    #[arg(long, env = "KURIR_SEGMENT_BYTES", value_name = "BYTES", value_parser = bytes, default_value = "16MiB")]
    pub segment_bytes: u64,

    /// Journal behind the last checkpoint at which the next is made, if that one was not larger
    #[arg(long, env = "KURIR_CHECKPOINT_BYTES", value_name = "BYTES", value_parser = bytes, default_value = "256MiB")]
    pub checkpoint_bytes: u64,

    /// How long a connection that the server ends waits for its peer to end it too
    #[arg(long, env = "KURIR_LINGER_MS_MAX", value_name = "MS", default_value_t = 1_000)]
    pub linger_ms_max: u64,

    /// How long a stop waits for replies to be made durable and read
    #[arg(long, env = "KURIR_STOP_MS_MAX", value_name = "MS", default_value_t = 5_000)]
    pub stop_ms_max: u64,
}

impl Limits {
    /// Says what is wrong with the values: a server with them could not serve anybody.
    ///
    /// # Errors
    /// A text that names the flag.
    pub fn check(&self) -> Result<(), String> {
        let counts = [
            ("connections-max", self.connections_max as u64),
            ("accepts-per-turn-max", self.accepts_per_turn_max as u64),
            ("requests-per-turn-max", self.requests_per_turn_max as u64),
            ("read-bytes-per-turn-max", self.read_bytes_per_turn_max),
            ("bytes-per-turn-max", self.bytes_per_turn_max),
            ("inbox-messages-max", self.inbox_messages_max as u64),
            ("password-queue-max", self.password_queue_max as u64),
            ("tokens-per-user-max", self.tokens_per_user_max as u64),
            ("connections-per-address-max", self.connections_per_address_max as u64),
            ("admin-connections-max", self.admin_connections_max as u64),
            ("password-queue-per-address-max", self.password_queue_per_address_max as u64),
            ("read-queue-max", self.read_queue_max as u64),
            ("read-queue-per-user-max", self.read_queue_per_user_max as u64),
            ("inboxes-per-user-max", self.inboxes_per_user_max as u64),
            ("login-delay-ms-max", self.login_delay_ms_max),
            ("login-failures-max", u64::from(self.login_failures_max)),
            ("login-failures-per-address-max", u64::from(self.login_failures_per_address_max)),
            ("counted-max", self.counted_max as u64),
        ];
        if let Some((flag, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(format!("--{flag} is at least 1"));
        }
        if !(LINE_BYTES_LEAST..=LINE_BYTES_MOST).contains(&self.line_bytes_max) {
            return Err("--line-bytes-max is from 1KiB to 1MiB".to_owned());
        }
        let is_whole = self.segment_bytes.is_multiple_of(BLOCK_BYTES as u64);
        if !is_whole || !(SEGMENT_BYTES_LEAST..=SEGMENT_BYTES_MOST).contains(&self.segment_bytes) {
            return Err("--segment-bytes is from 256KiB to 1GiB, in steps of 4KiB".to_owned());
        }
        if self.segment_bytes / 4 < self.line_bytes_max {
            return Err("--segment-bytes is at least four times --line-bytes-max".to_owned());
        }
        if self.output_bytes_max < self.output_bytes_high.saturating_add(self.inbox_bytes_max) {
            return Err("--output-bytes-max is at least --output-bytes-high and --inbox-bytes-max together".to_owned());
        }
        let answers_max = self.files_answer_bytes_max().max(self.groups_answer_bytes_max());
        if self.output_bytes_max < self.output_bytes_high.saturating_add(answers_max) {
            let least = self.output_bytes_high.saturating_add(answers_max).div_ceil(MIB);
            return Err(format!(
                "--output-bytes-max is at least {least}MiB with these limits, or answers to MY FILE and MY GROUP may be too \
                 long for it (see --listed-files-max, --user-files-max, --groups-per-user-max, --members-per-group-max)"
            ));
        }
        if self.connections_bytes_max < self.output_bytes_max {
            return Err("--connections-bytes-max is at least --output-bytes-max".to_owned());
        }
        Ok(())
    }

    /// What MY FILE may have to answer at most.
    fn files_answer_bytes_max(&self) -> u64 {
        let files = self.listed_files_max.saturating_add(self.user_files_max);
        files.saturating_mul(FILE_LISTED_BYTES_MAX) as u64
    }

    /// The same for MY GROUP.
    fn groups_answer_bytes_max(&self) -> u64 {
        let members = self.groups_per_user_max.saturating_mul(self.members_per_group_max);
        members.saturating_mul(MEMBER_LISTED_BYTES_MAX) as u64
    }

    /// The size up to which a file is a small one. Its line must be short enough to be there as a whole.
    #[must_use]
    pub fn small_file_bytes(&self) -> usize {
        usize::try_from(self.small_file_bytes_max.min(self.line_bytes_max / 2)).unwrap_or(usize::MAX)
    }
}

impl Default for Limits {
    /// The same values as the flags' defaults; a test holds the two equal.
    fn default() -> Self {
        Self {
            connections_max: usize::MAX,
            connections_per_address_max: 1000,
            admin_connections_max: 16,
            limit_loopback: false,
            accepts_per_turn_max: 64,
            turned_away_max: 32,
            requests_per_turn_max: 512,
            read_bytes_per_turn_max: 256 * KIB,
            bytes_per_turn_max: MIB,
            line_bytes_max: 64 * KIB,
            discard_bytes_max: 16 * MIB,
            output_bytes_high: MIB,
            output_bytes_max: 32 * MIB,
            connections_bytes_max: 256 * MIB,
            idle_ms_max: 1_800_000,
            first_request_ms_max: 60_000,
            auth_ms_max: 120_000,
            line_ms_max: 60_000,
            output_ms_max: 60_000,
            inbox_messages_max: 10_000,
            inbox_bytes_max: 8 * MIB,
            mailbox_messages_max: 100_000,
            messages_max: 20_000_000,
            mailbox_bytes_max: 256 * MIB,
            file_bytes_max: GIB,
            small_file_bytes_max: 16 * KIB,
            user_bytes_max: 10 * GIB,
            user_files_max: 10_000,
            files_bytes_max: TIB,
            listed_files_max: 20_000,
            uploads_max: 256,
            downloads_max: 256,
            transfers_per_user_max: 32,
            read_queue_max: 64,
            read_queue_per_user_max: 8,
            inboxes_per_user_max: 1000,
            password_queue_max: 64,
            password_queue_per_address_max: 16,
            login_failures_max: 5,
            login_failures_per_address_max: 50,
            login_delay_ms_max: 900_000,
            counted_max: 65_536,
            registrations_per_minute_max: 10,
            tokens_per_user_max: 100,
            users_max: 1_000_000,
            groups_max: 1_000_000,
            groups_per_user_max: 100,
            members_per_group_max: 5000,
            groups_per_minute_max: 10,
            groups_per_minute_per_address_max: 100,
            segment_bytes: 16 * MIB,
            checkpoint_bytes: 256 * MIB,
            linger_ms_max: 1_000,
            stop_ms_max: 5_000,
        }
    }
}

/// Reads a size as `4096`, `64KiB`, `10MiB`, `1GiB` or `2TiB`.
///
/// # Errors
/// A text that says what forms are known.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => KIB,
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => TIB,
        _ => return Err("a size is a number of bytes, or one with KiB, MiB, GiB or TiB".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "a size starts with a whole number, as in 64MiB".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "this size is larger than 64 bits hold".to_owned())
}

/// Reads a count, or `fit` for as many as there can be.
///
/// # Errors
/// A text that says what is known.
fn count_or_fit(text: &str) -> Result<usize, String> {
    if text == "fit" {
        return Ok(usize::MAX);
    }
    text.parse().map_err(|_| "it is a whole number, or fit".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        limits: Limits,
    }

    #[test]
    fn the_defaults_of_the_flags_are_the_defaults_of_the_type() {
        let flags = Flags::parse_from(["kurir"]);
        assert_eq!(format!("{:?}", flags.limits), format!("{:?}", Limits::default()));
    }

    #[test]
    fn limits_with_which_nobody_could_be_served_are_refused() {
        assert_eq!(Limits::default().check(), Ok(()));
        let refused = |flag: &str, value: &str| Flags::parse_from(["kurir", flag, value]).limits.check().is_err();
        for flag in ["--requests-per-turn-max", "--accepts-per-turn-max", "--connections-max", "--inbox-messages-max"] {
            assert!(refused(flag, "0"), "{flag} 0");
        }
        assert!(refused("--line-bytes-max", "100"));
        assert!(refused("--line-bytes-max", "18446744073709551615"));
    }

    #[test]
    fn a_size_is_a_number_with_or_without_a_unit() {
        assert_eq!(bytes("0"), Ok(0));
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("64KiB"), Ok(65_536));
        assert_eq!(bytes("1TiB"), Ok(TIB));
        for wrong in ["", "KiB", "1kb", "-1", "1.5MiB", "1 MiB", "99999999999TiB", "18446744073709551616"] {
            assert!(bytes(wrong).is_err(), "{wrong} was taken for a size");
        }
    }
}
