//! What a request costs before and after the engine: framing, parsing, replies, base64.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use base64::Engine;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kurir::buffer::{Line, ReadBuffer};
use kurir::change::Message;
use kurir::content::{ContentReader, encode};
use kurir::reply::Reply;
use kurir::reply::{InboxWriter, Item, ok};
use kurir::request::parse;
use kurir::transfer::BLOCK_BYTES;
use kurir::verb::{Audience, Dialect, recognise};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const LINE_BYTES_MAX: usize = 64 * 1024;

fn requests() -> Vec<(&'static str, String)> {
    let text = "x".repeat(100);
    vec![
        ("send_message", format!("SEND MESSAGE {TOKEN} henderson {text}")),
        ("send_group_message", format!("SEND GROUP MESSAGE {TOKEN} group1 {text}")),
        ("classic_send", format!("send {TOKEN} henderson  {text} ")),
        ("inbox", format!("INBOX {TOKEN}")),
        ("auth", "AUTH messi surabaya".to_owned()),
        ("unknown", "HALO apa kabar".to_owned()),
    ]
}

fn framing(c: &mut Criterion) {
    let mut group = c.benchmark_group("framing");
    let line = format!("SEND MESSAGE {TOKEN} henderson {}\r\n", "x".repeat(100));
    let input = line.repeat(100);
    group.throughput(Throughput::Bytes(input.len() as u64));
    group.bench_function("100_lines", |b| {
        let mut buffer = ReadBuffer::default();
        b.iter(|| {
            let mut rest = input.as_bytes();
            while !rest.is_empty() {
                let room = buffer.room();
                let count = room.len().min(rest.len());
                room[..count].copy_from_slice(&rest[..count]);
                buffer.fill(count);
                rest = &rest[count..];
                while let Line::Whole { content, length } = buffer.line(LINE_BYTES_MAX) {
                    black_box(buffer.slice(content));
                    buffer.consume(length);
                }
            }
        });
    });
    group.finish();
}

fn parsing(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    for (name, line) in requests() {
        group.throughput(Throughput::Bytes(line.len() as u64));
        group.bench_function(name, |b| b.iter(|| parse(black_box(line.as_bytes()), Audience::Client).is_ok()));
    }
    group.finish();
}

fn replies(c: &mut Criterion) {
    let mut group = c.benchmark_group("reply");
    let (spec, _) = recognise(b"SEND MESSAGE", Audience::Client).unwrap();
    let mut out = Vec::new();
    ok(&mut out, &Reply::Done, spec);
    group.throughput(Throughput::Bytes(out.len() as u64));
    group.bench_function("done", |b| {
        b.iter(|| {
            out.clear();
            ok(black_box(&mut out), &Reply::Done, spec);
        });
    });
    let text = "halo, apa kabar? ".repeat(6);
    let items = (1..=100).map(|id| Item {
        id,
        message: Message {
            at: 1_767_225_600_000 + id,
            from: if id % 2 == 0 { b"messi" } else { b"lineker" },
            to: b"henderson",
            is_to_group: false,
            text: text.as_bytes(),
        },
    });
    let mut writer = InboxWriter::default();
    for (name, dialect) in [("inbox_100", Dialect::Written), ("classic_inbox_100", Dialect::Classic)] {
        out.clear();
        writer.write(&mut out, items.clone(), usize::MAX, dialect);
        group.throughput(Throughput::Bytes(out.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                writer.write(black_box(&mut out), items.clone(), usize::MAX, dialect)
            });
        });
    }
    group.finish();
}

/// One block, as a transfer handles it, and the routines that could do it.
fn base64(c: &mut Criterion) {
    let mut group = c.benchmark_group("base64");
    let block: Vec<u8> = (0..BLOCK_BYTES).map(|number| number.to_le_bytes()[0]).collect();
    let mut encoded = Vec::new();
    encode(&block, &mut encoded);
    group.throughput(Throughput::Bytes(block.len() as u64));
    let mut out = Vec::new();
    group.bench_function("encode_block", |b| {
        b.iter(|| {
            out.clear();
            encode(black_box(&block), &mut out);
        });
    });
    group.bench_function("decode_block", |b| {
        b.iter(|| {
            out.clear();
            ContentReader::default().read(black_box(&encoded), &mut out)
        });
    });
    let mut room = vec![0; encoded.len()];
    let scalar = base64::engine::general_purpose::STANDARD;
    let vector = base64::engine::Simd::standard(base64::engine::general_purpose::PAD);
    group.bench_function("encode/base64_scalar", |b| b.iter(|| scalar.encode_slice(black_box(&block), &mut room)));
    group.bench_function("encode/base64_vector", |b| b.iter(|| vector.encode_slice(black_box(&block), &mut room)));
    group.bench_function("encode/base64_simd", |b| {
        b.iter(|| base64_simd::STANDARD.encode(black_box(&block), base64_simd::Out::from_slice(&mut room)).len());
    });
    group.bench_function("decode/base64_scalar", |b| b.iter(|| scalar.decode_slice(black_box(&encoded), &mut room)));
    group.bench_function("decode/base64_vector", |b| b.iter(|| vector.decode_slice(black_box(&encoded), &mut room)));
    group.bench_function("decode/base64_simd", |b| {
        b.iter(|| {
            let out = base64_simd::Out::from_slice(&mut room);
            base64_simd::STANDARD.decode(black_box(&encoded), out).map(|decoded| decoded.len())
        });
    });
    group.finish();
}

criterion_group!(benches, framing, parsing, replies, base64);
criterion_main!(benches);
