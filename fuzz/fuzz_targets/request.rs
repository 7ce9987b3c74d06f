//! Every line gets an answer, and what it borrows lies inside the line.

#![no_main]

use kurir::request::parse;
use kurir::verb::{Audience, Dialect, Last};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    for audience in [Audience::Client, Audience::Admin] {
        match parse(line, audience) {
            Ok(request) => {
                let range = line.as_ptr_range();
                for index in 0..3 {
                    let parameter = request.parameter(index);
                    if !parameter.is_empty() {
                        let end = parameter.as_bytes().as_ptr_range().end;
                        assert!(range.start <= parameter.as_ptr() && end <= range.end);
                    }
                    let is_text = request.spec.last == Last::Text && index == 2;
                    assert!(is_text || !parameter.contains(' '));
                    assert!(
                        !is_text
                            || request.spec.dialect == Dialect::Written
                            || parameter.trim_matches(' ') == parameter
                    );
                }
                assert_eq!(request.content_at.is_some(), request.spec.last == Last::Content);
                assert!(request.content_at.is_none_or(|at| line[at] == b' '));
            }
            Err(fault) => assert!(!fault.refusal.to_string().is_empty()),
        }
    }
});
