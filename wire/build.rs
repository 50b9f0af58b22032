//! Compiles the protobuf messages with `protoc`, which etcd's client needs for its own.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/ashlar.proto");
    tonic_prost_build::configure().bytes(".ashlar.v1.HiddenRows.rows").compile_protos(&["proto/ashlar.proto"], &["proto"])?;
    Ok(())
}
