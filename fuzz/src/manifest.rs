//! The zoo's own JSON objects, tensor headers, and the configuration of checkpoints.

use ashlar_zoo::canonical;
use ashlar_zoo::family::{self, Config};
use ashlar_zoo::manifest::{Adapter, Block, Chain, ModelName};
use ashlar_zoo::measures::Measure;
use ashlar_zoo::profiles::Profile;
use ashlar_zoo::tensor_file;

/// What is read reads back the same; what does not fit is refused.
pub fn manifest(data: &[u8]) {
    if let Ok(block) = serde_json::from_slice::<Block>(data)
        && block.check().is_ok()
    {
        assert_eq!(serde_json::from_slice::<Block>(&canonical::to_bytes(&block)).ok(), Some(block));
    }
    if let Ok(adapter) = serde_json::from_slice::<Adapter>(data)
        && adapter.check().is_ok()
    {
        assert_eq!(serde_json::from_slice::<Adapter>(&canonical::to_bytes(&adapter)).ok(), Some(adapter));
    }
    if let Ok(chain) = serde_json::from_slice::<Chain>(data)
        && chain.check().is_ok()
    {
        assert_eq!(serde_json::from_slice::<Chain>(&canonical::to_bytes(&chain)).ok(), Some(chain));
    }
    if let Ok(name) = serde_json::from_slice::<ModelName>(data) {
        assert_eq!(serde_json::from_slice::<ModelName>(&canonical::to_bytes(&name)).ok(), Some(name));
    }
    if let Ok(measure) = serde_json::from_slice::<Measure>(data)
        && measure.check().is_ok()
    {
        assert_eq!(serde_json::from_slice::<Measure>(&canonical::to_bytes(&measure)).ok(), Some(measure));
    }
    // As it is, and as who knows the checksum may write it.
    if let Ok(profile) = Profile::parse(data) {
        assert_eq!(Profile::parse(&profile.to_bytes()).ok(), Some(profile));
    }
    if let Ok(profile) = serde_json::from_slice::<Profile>(data)
        && profile.check().is_ok()
    {
        assert_eq!(Profile::parse(&profile.to_bytes()).ok(), Some(profile));
    }
    let _ = tensor_file::verify_alone(data);
    if let Ok(config) = Config::parse(data, "config.json") {
        let _ = family::from_config(&config, &|_| false);
    }
}
