//! The request parser takes no memory: a test of its own, since it counts every allocation of the process.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use kurir::request::parse;
use kurir::verb::Audience;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

#[test]
fn parsing_allocates_nothing() {
    let token = "0123456789abcdef0123456789abcdef";
    let mut lines: Vec<Vec<u8>> = [
        format!("SEND MESSAGE {token} henderson halo, apa kabar?"),
        format!("send {token} henderson  halo  "),
        format!("SEND FILE {token} henderson a.txt {}", "QUJD".repeat(1000)),
        format!("INBOX {token}"),
        format!("CREATE GROUP {token} tim rahasia"),
        "AUTH messi".to_owned(),
        "AUTH messi surabaya lagi".to_owned(),
        "HALO".to_owned(),
        String::new(),
    ]
    .map(String::into_bytes)
    .to_vec();
    lines.push(b"SEND MESSAGE \xff".to_vec());

    let _profiler = dhat::Profiler::builder().testing().build();
    let before = dhat::HeapStats::get().total_blocks;
    let understood = lines.iter().filter(|line| parse(line, Audience::Client).is_ok()).count();
    let after = dhat::HeapStats::get().total_blocks;
    assert_eq!(after, before);
    assert_eq!(understood, 5);
}
