//! The two files of a PEFT adapter: opened once, then copied to where nobody else can change them, so that what is planned, hashed and
//! stored is one content, whatever happens to the files meanwhile. A folder that a request names is judged by what was opened, not by
//! its path: a link that is turned between two looks leads nowhere new.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{CONFIG, WEIGHTS, missing};
use crate::family::Config;
use crate::formats::{TensorFiles, shards};
use crate::ingest::IngestError;
use crate::ingest::checkpoint::{CONFIG_BYTES_MAX, source_name};
use crate::mapping::Mapping;
use crate::store::Zoo;

/// Largest adapter_model.safetensors: an adapter that brings token table and head of a model of 70 B whole has about 6 GB.
pub const ADAPTER_BYTES_MAX: u64 = 16 << 30;

/// A PEFT adapter's files, open.
#[derive(Debug)]
pub struct AdapterFiles {
    /// The folder's own name.
    source: String,
    config: Opened,
    weights: Opened,
    /// Things that the user should know.
    notes: Vec<String>,
}

#[derive(Debug)]
struct Opened {
    /// For people.
    path: PathBuf,
    file: File,
    /// Its size, and when it was changed last, as it was opened.
    stamp: (u64, Option<SystemTime>),
}

/// What no one else can change.
#[derive(Debug)]
pub(super) struct Private {
    pub(super) config: Config,
    pub(super) tensors: TensorFiles,
    pub(super) source: String,
    pub(super) notes: Vec<String>,
}

impl AdapterFiles {
    /// Opens those of a folder.
    ///
    /// # Errors
    /// What is missing, or cannot be opened.
    pub fn open(folder: &Path) -> Result<Self, IngestError> {
        Self::of(folder, folder, source_name(folder)?)
    }

    /// `folder` is where they are opened, `shown` how errors name it.
    fn of(folder: &Path, shown: &Path, source: String) -> Result<Self, IngestError> {
        let config = Opened::at(folder, shown, CONFIG)?.ok_or_else(|| missing(shown, "it has no adapter_config.json"))?;
        let without = "it has no adapter_model.safetensors (pickled weights are never read)";
        let weights = Opened::at(folder, shown, WEIGHTS)?.ok_or_else(|| missing(shown, without))?;
        let own = ["tokenizer.json", "chat_template.jinja"].into_iter().filter(|name| folder.join(name).exists());
        let notes = own.map(|name| format!("the adapter's own {name} is not used: an adapter speaks with its base's")).collect();
        Ok(Self { source, config, weights, notes })
    }

    /// Copies them: the configuration into memory, the weights into a file without a name that ends with the process.
    pub(super) fn copied(self, zoo: &Zoo) -> Result<Private, IngestError> {
        let Self { source, config, weights, notes } = self;
        let mut bytes = Vec::new();
        config.limited(CONFIG_BYTES_MAX)?.read_to_end(&mut bytes).map_err(|error| config.failed(error))?;
        config.check_copied(bytes.len() as u64)?;
        let mut copy = zoo.private_file()?;
        let copied = io::copy(&mut weights.limited(ADAPTER_BYTES_MAX)?, &mut copy).map_err(|error| weights.failed(error))?;
        weights.check_copied(copied)?;
        config.check_copied(bytes.len() as u64)?;
        let mut tensors = TensorFiles::default();
        let map = Mapping::of(&copy).map_err(|error| weights.failed(error))?;
        shards::add_map(&mut tensors, map, &weights.path)?;
        Ok(Private { config: Config::parse(&bytes, CONFIG)?, tensors, source, notes })
    }
}

impl Opened {
    /// Opens a plain file; `None` where there is none.
    fn at(folder: &Path, shown: &Path, name: &str) -> Result<Option<Self>, IngestError> {
        let path = shown.join(name);
        let failed = |source| IngestError::Io { path: path.clone(), source };
        let file = match open_at_once(&folder.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file")));
        }
        Ok(Some(Self { stamp: (meta.len(), meta.modified().ok()), path, file }))
    }

    /// Its bytes, of which there are at most so many and one more where it has grown.
    fn limited(&self, max: u64) -> Result<io::Take<&File>, IngestError> {
        let actual = self.stamp.0;
        if actual > max {
            return Err(IngestError::TooLarge { path: self.path.clone(), actual, max });
        }
        Ok((&self.file).take(actual + 1))
    }

    /// Whether a copy of so many bytes is of the file as it was opened.
    fn check_copied(&self, bytes: u64) -> Result<(), IngestError> {
        let meta = self.file.metadata().map_err(|error| self.failed(error))?;
        let is_same = bytes == self.stamp.0 && (meta.len(), meta.modified().ok()) == self.stamp;
        if is_same { Ok(()) } else { Err(IngestError::FileChanged { path: self.path.clone() }) }
    }

    fn failed(&self, source: io::Error) -> IngestError {
        IngestError::Io { path: self.path.clone(), source }
    }
}

/// Opens for reading; a pipe without a writer does not hold it.
fn open_at_once(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(target_os = "linux")]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, O_NONBLOCK);
    options.open(path)
}

/// Of Linux on x86-64 and aarch64. It changes nothing for plain files.
#[cfg(target_os = "linux")]
const O_NONBLOCK: i32 = 0o4000;

/// A folder whose folders requests may name.
#[derive(Debug, Clone)]
pub struct AdaptersDir {
    path: PathBuf,
}

impl AdaptersDir {
    /// The folder at `path`.
    ///
    /// # Errors
    /// When it is no folder that can be looked into, or the system cannot tell where an open file lies (Linux can).
    pub fn at(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        place_of(&File::open(path.join("."))?)?;
        Ok(Self { path })
    }

    /// Opens the adapter in the folder `name` below this one. Links are followed, as far as they lead to what is below it too.
    ///
    /// # Errors
    /// [`IngestError::Outside`] where nothing below this folder is meant, be there something elsewhere or not; else as [`AdapterFiles::open`].
    pub fn open(&self, name: &str) -> Result<AdapterFiles, IngestError> {
        let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
        let outside = || IngestError::Outside { name: shown.clone() };
        let root = File::open(&self.path).and_then(|root| place_of(&root)).map_err(|_| outside())?;
        // With the dot it opens folders alone, and waits for no pipe.
        let folder = File::open(self.path.join(name).join(".")).map_err(|_| outside())?;
        let place = place_of(&folder).map_err(|_| outside())?;
        let is_below = |place: &Path| place.starts_with(&root) && *place != root;
        if !is_below(&place) {
            return Err(outside());
        }
        let source = place.file_name().expect("what lies below a folder has a name").to_string_lossy().into_owned();
        // In the folder that was opened, wherever its path leads by now.
        let files = AdapterFiles::of(&handle_of(&folder), Path::new(&shown), source)?;
        for opened in [&files.config, &files.weights] {
            if !place_of(&opened.file).is_ok_and(|place| is_below(&place)) {
                return Err(outside());
            }
        }
        Ok(files)
    }
}

/// Longest name that an error repeats, in characters.
const SHOWN_CHARS_MAX: usize = 200;

/// A path that leads to what is open.
fn handle_of(file: &File) -> PathBuf {
    #[cfg(unix)]
    return PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)));
    #[cfg(not(unix))]
    PathBuf::from("no path leads to an open file")
}

/// Where an open file or folder lies, without links.
fn place_of(file: &File) -> io::Result<PathBuf> {
    std::fs::read_link(handle_of(file))
}

#[cfg(test)]
mod tests;
