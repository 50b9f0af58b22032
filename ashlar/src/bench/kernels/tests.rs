//! Arguments: what they are by themselves, and what is said of wrong ones.

use clap::{CommandFactory, Parser};

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    kernels: KernelsArgs,
}

fn refused(line: &str) -> String {
    match Cli::try_parse_from(["kernels"].into_iter().chain(line.split_whitespace())) {
        Err(error) => error.to_string(),
        Ok(cli) => format!("{:#}", measure(&cli.kernels).expect_err(line)),
    }
}

#[test]
fn defaults_are_those_of_the_measurement_and_are_told() {
    let options = options(&Cli::try_parse_from(["kernels"]).expect("no argument is needed").kernels).expect("they fit each other");
    let expected = BenchOptions::default();
    assert_eq!((&options.dtypes, &options.shapes, &options.row_counts), (&expected.dtypes, &expected.shapes, &expected.row_counts));
    assert_eq!((options.rotate_bytes, options.budget), (expected.rotate_bytes, expected.budget));
    let help = Cli::command().render_help().to_string();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for default in [DTYPES_DEFAULT, SHAPES_DEFAULT, ROWS_DEFAULT, ROTATE_MIB_DEFAULT] {
        assert!(help.contains(&format!("[default: {default}]")), "{help}");
    }
    assert!(help.contains("--threads <THREADS>") && help.contains("[default: all cores]"), "{help}");
}

#[test]
fn wrong_arguments_are_told_before_anything_is_measured() {
    for (line, says) in [
        ("--rows a", "invalid value 'a' for '--rows <ROWS>': expected a whole number from 1 to 65536"),
        ("--rows 0", "invalid value '0' for '--rows <ROWS>': expected a whole number from 1 to 65536"),
        ("--rows 1,-2", "invalid value '-2' for '--rows <ROWS>': expected a whole number from 1 to 65536"),
        ("--threads=-1", "invalid value '-1' for '--threads <THREADS>': expected a whole number from 1 to 1024, or 0 for all cores"),
        ("--threads -1", "invalid value '-1' for '--threads <THREADS>': expected a whole number from 1 to 1024, or 0 for all cores"),
        ("--threads 1025", "'1025' for '--threads <THREADS>'"),
        ("--rotate-mib 0", "invalid value '0' for '--rotate-mib <MIB>': expected a whole number from 1 to 16384"),
        ("--dtypes int9", "invalid value 'int9' for '--dtypes <FORMATS>': expected f32, f16,"),
        ("--shapes 576", "invalid value '576' for '--shapes <SHAPES>': a shape is outputs x inputs"),
        ("--shapes 100x100", "use --shapes 100x100 with q8_0: its rows are whole blocks of 32 inputs"),
        ("--shapes 64x64 --dtypes q4_k", "use --shapes 64x64 with q4_k: its rows are whole blocks of 256 inputs"),
        ("--json /nonexistent/a.json", "for '--json <FILE>': there is no folder /nonexistent"),
        ("--json /tmp", "for '--json <FILE>': expected a file to write, and that is a folder"),
        ("--full --json a.json --rows 1", "--rows"),
    ] {
        let error = refused(line);
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[test]
fn shapes_are_read_and_bounded() {
    assert_eq!(shape("576x1536"), Ok((576, 1536)));
    for bad in ["576", "x", "0x5", "99999999x99999999", "18446744073709551615x2"] {
        assert!(shape(bad).is_err(), "{bad}");
    }
}
