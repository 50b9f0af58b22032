//! What a request may name is what lies below the folder when it is opened, and what is copied is what was opened.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// A folder of adapters (`shelf`) beside one that nobody may load (`outside`); their configurations say which they are.
struct Shelf {
    dir: tempfile::TempDir,
}

impl Shelf {
    fn new() -> Self {
        let shelf = Self { dir: tempfile::tempdir().unwrap() };
        shelf.adapter("shelf/one", "inside");
        shelf.adapter("outside", "outside");
        shelf
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn adapter(&self, name: &str, what: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
        std::fs::write(self.path(name).join(CONFIG), what).unwrap();
        std::fs::write(self.path(name).join(WEIGHTS), what).unwrap();
    }

    fn link(&self, to: &str, name: &str) {
        symlink(to, self.path(name)).unwrap();
    }

    fn open(&self, name: &str) -> Result<AdapterFiles, IngestError> {
        AdaptersDir::at(&self.path("shelf")).unwrap().open(name)
    }
}

fn text(mut opened: &File) -> String {
    let mut text = String::new();
    opened.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn folders_below_are_opened_by_whatever_name() {
    let shelf = Shelf::new();
    shelf.link("one", "shelf/link");
    shelf.link("../outside/../shelf", "shelf/round");
    std::fs::create_dir(shelf.path("shelf/two")).unwrap();
    shelf.link("../one/adapter_config.json", "shelf/two/adapter_config.json");
    shelf.link("../one/adapter_model.safetensors", "shelf/two/adapter_model.safetensors");
    let absolute = shelf.path("shelf/one");
    for (name, source) in [
        ("one", "one"),
        ("./one/", "one"),
        ("two/../one", "one"),
        ("link", "one"),
        ("round/one", "one"),
        ("two", "two"),
        (absolute.to_str().unwrap(), "one"),
    ] {
        let files = shelf.open(name).unwrap();
        assert_eq!((files.source.as_str(), text(&files.config.file)), (source, "inside".to_owned()), "{name}");
    }
}

#[test]
fn what_lies_elsewhere_is_not_told_from_what_does_not_exist() {
    let shelf = Shelf::new();
    shelf.link("../outside", "shelf/link");
    std::fs::create_dir(shelf.path("shelf/file-link")).unwrap();
    shelf.link("../../outside/adapter_config.json", "shelf/file-link/adapter_config.json");
    shelf.link("../one/adapter_model.safetensors", "shelf/file-link/adapter_model.safetensors");
    shelf.adapter("shelf", "the folder itself");
    shelf.adapter("shelf-2", "a name that begins alike");
    std::fs::write(shelf.path("shelf/plain"), "no folder").unwrap();
    let absolute = shelf.path("outside");
    let names = [
        "none",
        "",
        ".",
        "one/..",
        "../outside",
        "../shelf-2",
        "link",
        "file-link",
        "plain",
        "plain/one",
        "a\0b",
        "/",
        absolute.to_str().unwrap(),
    ];
    for name in names {
        let error = shelf.open(name).unwrap_err();
        assert_eq!(error.to_string(), format!("`{name}` is nothing in the folder that adapters are loaded from"));
    }
    let long = "x".repeat(5000);
    assert!(shelf.open(&long).unwrap_err().to_string().len() < 300);
}

#[test]
fn a_folder_that_holds_no_adapter_is_told_so_and_a_pipe_holds_nobody() {
    let shelf = Shelf::new();
    std::fs::create_dir_all(shelf.path("shelf/empty")).unwrap();
    let error = shelf.open("empty").unwrap_err().to_string();
    assert_eq!(error, "empty holds no checkpoint: it has no adapter_config.json");
    std::fs::remove_file(shelf.path("shelf/one/adapter_model.safetensors")).unwrap();
    assert!(shelf.open("one").unwrap_err().to_string().contains("it has no adapter_model.safetensors"));
    for pipe in ["shelf/pipe", "shelf/one/adapter_model.safetensors"] {
        assert!(Command::new("mkfifo").arg(shelf.path(pipe)).status().unwrap().success());
    }
    assert!(matches!(shelf.open("pipe").unwrap_err(), IngestError::Outside { .. }));
    let IngestError::Io { path, source } = shelf.open("one").unwrap_err() else { panic!("it is no plain file") };
    assert_eq!((path.to_str().unwrap(), source.to_string().as_str()), ("one/adapter_model.safetensors", "not a plain file"));
}

/// The path is looked at more than once while it is opened; between two looks a link may be turned.
#[test]
fn a_link_that_is_turned_meanwhile_leads_nowhere_new() {
    let shelf = Shelf::new();
    shelf.link("one", "shelf/turning");
    let done = AtomicBool::new(false);
    let mut opened = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in (0..).take_while(|_| !done.load(Ordering::Relaxed)) {
                shelf.link(if turn % 2 == 0 { "../outside" } else { "one" }, "shelf/next");
                std::fs::rename(shelf.path("shelf/next"), shelf.path("shelf/turning")).unwrap();
            }
        });
        for _ in 0..3000 {
            if let Ok(files) = shelf.open("turning") {
                opened += 1;
                for file in [&files.config.file, &files.weights.file] {
                    assert_eq!(text(file), "inside");
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(opened > 0, "the link leads inside half of the time");
}

#[tokio::test]
async fn a_file_that_changes_between_opening_and_copying_is_refused() {
    let shelf = Shelf::new();
    let zoo = Zoo::create_dir(&shelf.path("zoo")).await.unwrap();
    for (name, bytes) in [(CONFIG, "longer than before"), (CONFIG, ""), (WEIGHTS, "longer than before"), (WEIGHTS, "")] {
        shelf.adapter("shelf/one", "inside");
        let files = shelf.open("one").unwrap();
        std::fs::write(shelf.path("shelf/one").join(name), bytes).unwrap();
        let error = files.copied(&zoo).unwrap_err();
        assert_eq!(error.to_string(), format!("one/{name} was changed while it was read: try again once it is whole"));
    }
}

#[tokio::test]
async fn files_over_the_limits_are_refused_before_they_are_read() {
    let shelf = Shelf::new();
    let zoo = Zoo::create_dir(&shelf.path("zoo")).await.unwrap();
    for (name, max) in [(WEIGHTS, ADAPTER_BYTES_MAX), (CONFIG, CONFIG_BYTES_MAX)] {
        // A hole: it takes no room.
        File::options().write(true).open(shelf.path("shelf/one").join(name)).unwrap().set_len(max + 1).unwrap();
        let error = shelf.open("one").unwrap().copied(&zoo).unwrap_err();
        assert_eq!(error.to_string(), format!("one/{name} has {} bytes, more than {max}", max + 1));
    }
}
