//! Compiles the protobuf messages with a compiler written in Rust, so that no `protoc` is needed for them.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/ashlar.proto");
    let descriptors = protox::compile(["proto/ashlar.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".ashlar.v1.HiddenRows.rows").compile_fds(descriptors)?;
    Ok(())
}
