//! The kernels' sources into code of one architecture, by NVRTC, which is found at run time; and kept on disk, since that takes many seconds.

use std::ffi::{CStr, CString, c_char, c_int};
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::sources::{HEADERS, OPTIONS, Source};

/// Earlier compilers were never tried.
const COMPILER_MIN: (c_int, c_int) = (13, 0);

/// Why a source is not code.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The library that compiles is not on this machine, or not where libraries are looked for.
    #[error(
        "NVRTC is not there (libnvrtc.so.13): it comes with the CUDA toolkit, or with the Python package nvidia-cuda-nvrtc, whose folder LD_LIBRARY_PATH must then name"
    )]
    NoCompiler,
    /// The library is of an earlier CUDA.
    #[error(
        "NVRTC {version} is too old: 13.0 is the least that compiles the kernels; LD_LIBRARY_PATH must name the folder of such a libnvrtc.so.13 first"
    )]
    OldCompiler {
        /// As `12.4`.
        version: String,
    },
    /// It does not take the source, or does not know the architecture.
    #[error("NVRTC does not compile {source_name} for {architecture}: {reason}")]
    Refused {
        /// File of `kernels/cuda`.
        source_name: &'static str,
        /// As `sm_90a`.
        architecture: String,
        /// What it says.
        reason: String,
    },
}

/// Code, and what the compiler said of it: registers, spills, shared memory of each kernel.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// A cubin.
    pub code: Vec<u8>,
    /// The compiler's report.
    pub log: String,
}

/// Name of an architecture by its compute capability, with the features that only it has.
pub fn architecture(major: i32, minor: i32) -> String {
    // Hopper's and Blackwell's own instructions are outside of what later cards run.
    let feature = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{feature}")
}

/// Whether NVRTC can be loaded.
pub fn has_compiler() -> bool {
    // SAFETY: loads a library by name, which runs its initialisers; NVIDIA's have no other effect.
    unsafe { sys::is_culib_present() }
}

/// NVRTC's version, as `13.0`.
///
/// # Errors
/// When it is not there, or too old.
pub fn compiler_version() -> Result<String, CompileError> {
    if !has_compiler() {
        return Err(CompileError::NoCompiler);
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the library is there; both targets are ours.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|_| CompileError::NoCompiler)?;
    let version = format!("{major}.{minor}");
    if (major, minor) < COMPILER_MIN { Err(CompileError::OldCompiler { version }) } else { Ok(version) }
}

/// A program of NVRTC, which is given back in the end.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and nobody else has it.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

fn text(source: &Source) -> [CString; 2] {
    [source.text, source.name].map(|text| CString::new(text).expect("sources have no zero byte"))
}

/// Compiles one source.
///
/// # Errors
/// When there is no compiler that can be used, or it refuses.
pub fn compile(source: &Source, architecture: &str) -> Result<Compiled, CompileError> {
    compiler_version()?;
    let refused = |reason: String| CompileError::Refused { source_name: source.name, architecture: architecture.to_owned(), reason };
    let failed = |call: &'static str| move |error: nvrtc::NvrtcError| refused(format!("{call}: {error:?}"));
    let [code, name] = text(source);
    let headers: Vec<[CString; 2]> = HEADERS.iter().map(text).collect();
    let texts: Vec<*const c_char> = headers.iter().map(|[text, _]| text.as_ptr()).collect();
    let names: Vec<*const c_char> = headers.iter().map(|[_, name]| name.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings outlive the call, and there are as many texts as names.
    unsafe { sys::nvrtcCreateProgram(&mut program, code.as_ptr(), name.as_ptr(), texts.len() as c_int, texts.as_ptr(), names.as_ptr()) }
        .result()
        .map_err(failed("nvrtcCreateProgram"))?;
    let program = Program(program);
    let mut options: Vec<String> = OPTIONS.iter().map(|option| (*option).to_owned()).collect();
    options.extend([format!("--gpu-architecture={architecture}"), "--ptxas-options=-v".to_owned()]);
    options.extend((!source.define.is_empty()).then(|| format!("--define-macro={}", source.define)));
    // SAFETY: the program was created above.
    let outcome = unsafe { nvrtc::compile_program(program.0, &options) };
    // SAFETY: likewise, and it was compiled.
    let log = unsafe { nvrtc::get_program_log(program.0) }.map_err(failed("nvrtcGetProgramLog"))?;
    let log = string(&log);
    if let Err(error) = outcome {
        let said: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).take(12).collect();
        return Err(refused(if said.is_empty() { format!("nvrtcCompileProgram: {error:?}") } else { said.join(" | ") }));
    }
    let mut size = 0;
    // SAFETY: the program was compiled for a real architecture, so that there is code.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(failed("nvrtcGetCUBINSize"))?;
    let mut code = vec![0u8; size];
    // SAFETY: the target has as many bytes as were asked for.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }.result().map_err(failed("nvrtcGetCUBIN"))?;
    Ok(Compiled { code, log })
}

fn string(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map_or_else(|_| String::from_utf8_lossy(&bytes).into_owned(), |text| text.to_string_lossy().into_owned())
}

/// In the place of a compiler's version: code of the last one, for when there is none.
const ANY: &str = "any";

/// Code that was compiled before: a folder of files, each named by all that it depends on and beginning with the digest of what follows.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache in a folder, which is made when something is kept.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where caches are by custom: `$XDG_CACHE_HOME/ashlar/cuda`, else `~/.cache/ashlar/cuda`.
    pub fn of_user() -> Option<Self> {
        let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(Self::new(root.join("ashlar/cuda")))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Code of a source: as it is kept, or compiled and then kept. `driver` is the version of the driver that will load it.
    ///
    /// # Errors
    /// When it is not kept and cannot be compiled. A cache that cannot be written is a warning.
    pub fn code(&self, source: &Source, architecture: &str, driver: &str) -> Result<Vec<u8>, CompileError> {
        self.kept(source, architecture, driver).map_or_else(|| self.compiled(source, architecture, driver), Ok)
    }

    /// Code of a source that this compiler made before, or any where there is none.
    pub(crate) fn kept(&self, source: &Source, architecture: &str, driver: &str) -> Option<Vec<u8>> {
        let compiler = compiler_version().unwrap_or_else(|_| ANY.to_owned());
        read(&self.path(source, architecture, driver, &compiler))
    }

    /// Code of a source, compiled now and then kept.
    ///
    /// # Errors
    /// As [`compile`].
    pub(crate) fn compiled(&self, source: &Source, architecture: &str, driver: &str) -> Result<Vec<u8>, CompileError> {
        let compiler = compiler_version()?;
        tracing::info!(source = source.name, define = source.define, architecture, "compiling kernels; this is done once");
        let Compiled { code, .. } = compile(source, architecture)?;
        for compiler in [compiler.as_str(), ANY] {
            if let Err(error) = self.keep(&self.path(source, architecture, driver, compiler), &code) {
                tracing::warn!(folder = %self.folder.display(), %error, "compiled kernels cannot be kept, and are compiled again at the next start");
                break;
            }
        }
        Ok(code)
    }

    fn path(&self, source: &Source, architecture: &str, driver: &str, compiler: &str) -> PathBuf {
        self.folder.join(format!("{}.cubin", key(source, architecture, driver, compiler)))
    }

    /// Whole or not at all, whoever else writes the same.
    fn keep(&self, path: &Path, code: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
        let mut file = std::fs::File::create(&unfinished)?;
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)?;
        drop(file);
        std::fs::rename(&unfinished, path)
    }
}

/// What a kept file holds, if it is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (digest, code) = bytes.split_at_checked(blake3::OUT_LEN)?;
    if blake3::hash(code).as_bytes() == digest {
        return Some(code.to_vec());
    }
    tracing::warn!(file = %path.display(), "kept kernels are damaged, and are compiled again");
    None
}

/// By all that code depends on.
fn key(source: &Source, architecture: &str, driver: &str, compiler: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let texts = std::iter::once(source).chain(HEADERS).flat_map(|source| [source.name, source.text, source.define]);
    for part in texts.chain(OPTIONS.iter().copied()).chain([architecture, driver, compiler]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}
