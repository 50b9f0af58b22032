//! Names of tensors in adapter_model.safetensors, and which matrices of the base they mean. peft writes a module's path in the
//! transformers model behind `base_model.model.`; one written over a part of it, or beside a vision tower, has another prefix.

use std::collections::BTreeMap;

use super::base::Base;
use super::error::PeftError;
use crate::adapter::ADAPTED_ROLES;
use crate::family::names::{Names, Piece, Place};
use crate::roles::{self, RoleShape};

/// What a name says.
#[derive(Debug, PartialEq)]
pub(super) enum Key {
    /// A factor of the LoRA of `module`.
    Factor {
        /// Path of the module in the base.
        module: String,
        /// lora_A or lora_B.
        factor: Factor,
    },
    /// A tensor of the base as a whole, by its name there.
    Whole(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Factor {
    A,
    B,
}

impl Factor {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::A => "lora_A",
            Self::B => "lora_B",
        }
    }
}

/// Reads a tensor's name.
pub(super) fn parse(name: &str) -> Result<Key, PeftError> {
    let unknown = || PeftError::Unknown(name.to_owned());
    let path = name.strip_prefix("base_model.model.").ok_or_else(unknown)?;
    if let Some((_, rest)) = path.split_once(".lora_embedding_") {
        let is_factor = rest.starts_with(['A', 'B']);
        return Err(if is_factor { PeftError::NotAdapted { name: name.to_owned(), what: "embedding" } } else { unknown() });
    }
    if path.contains(".lora_magnitude_vector") {
        return Err(PeftError::Dora(name.to_owned()));
    }
    for factor in [Factor::A, Factor::B] {
        let Some((module, rest)) = path.split_once(&format!(".{}.", factor.name())) else { continue };
        return match rest.strip_prefix("default.").unwrap_or(rest) {
            "weight" => Ok(Key::Factor { module: module.to_owned(), factor }),
            "bias" => Err(PeftError::FactorBias(name.to_owned())),
            _ => Err(unknown()),
        };
    }
    if path.contains(".lora_") {
        return Err(unknown());
    }
    // A module with a LoRA, or a copy that is trained, wraps what it stands for.
    let path = path.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".").replace(".base_layer.", ".");
    Ok(Key::Whole(path))
}

/// A path without the prefix that the model around the layers gives it.
pub(super) fn bare(path: &str) -> &str {
    const PREFIXES: [&str; 5] = ["model.language_model.", "language_model.model.", "language_model.", "model.", "transformer."];
    PREFIXES.iter().find_map(|prefix| path.strip_prefix(prefix)).unwrap_or(path)
}

/// A tensor of the base, and where it is.
#[derive(Debug)]
pub(super) struct Site {
    /// Index of the block.
    pub(super) block: usize,
    pub(super) role: &'static str,
    pub(super) shape: RoleShape,
    /// What of the checkpoint's tensor it is.
    pub(super) piece: Piece,
}

/// All tensors of a base by the names that transformers gives them.
pub(super) struct Sites {
    names: Names,
    by_name: BTreeMap<String, Vec<Site>>,
}

impl Sites {
    /// `None` where the base's architecture is not one of transformers' that are known.
    pub(super) fn of(base: &Base) -> Option<Self> {
        let names = Names::of_architecture(&base.chain.architecture)?;
        let mut by_name: BTreeMap<String, Vec<Site>> = BTreeMap::new();
        for (index, block) in base.blocks.iter().enumerate() {
            let place = match index {
                0 => Place::Embed,
                _ if index + 1 == base.blocks.len() => Place::Head,
                _ => Place::Layer(u32::try_from((index - 1) / 2).expect("chains have at most 4096 blocks")),
            };
            for role in roles::roles(block.width, &block.params).into_iter().filter(|role| block.tensors.contains_key(role.name)) {
                let piece = names.piece(place, &block.params, role.name);
                let site = Site { block: index, role: role.name, shape: role.shape, piece };
                by_name.entry(site.piece.name.clone()).or_default().push(site);
            }
        }
        Some(Self { names, by_name })
    }

    /// The tensors that one of the checkpoint makes; its name as peft has it, with whatever prefix. Empty: the base has none.
    pub(super) fn get(&self, name: &str) -> &[Site] {
        self.by_name.get(bare(name)).map_or(&[], Vec::as_slice)
    }

    /// The names of all tensors, without prefix.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The paths of all modules that an adapter can change, without prefix.
    pub(super) fn linear_modules(&self) -> impl Iterator<Item = &str> {
        let linear = self.by_name.iter().filter(|(_, sites)| sites.iter().any(|site| ADAPTED_ROLES.contains(&site.role)));
        linear.filter_map(|(name, _)| name.strip_suffix(".weight"))
    }

    /// Whether it belongs to what is never served: other towers, masks.
    pub(super) fn ignores(&self, name: &str) -> bool {
        self.names.ignores(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_peft_writes_them() {
        let factor = |module: &str, factor| Ok(Key::Factor { module: module.to_owned(), factor });
        let whole = |path: &str| Ok(Key::Whole(path.to_owned()));
        let name = |name: &str| name.to_owned();
        for (text, expected) in [
            ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", factor("model.layers.0.mlp.up_proj", Factor::A)),
            ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", factor("model.layers.0.mlp.up_proj", Factor::B)),
            ("base_model.model.lm_head.weight", whole("lm_head.weight")),
            ("base_model.model.lm_head.modules_to_save.default.weight", whole("lm_head.weight")),
            ("base_model.model.h.0.attn.c_attn.base_layer.bias", whole("h.0.attn.c_attn.bias")),
            ("model.layers.0.mlp.up_proj.lora_A.weight", Err(PeftError::Unknown(name("model.layers.0.mlp.up_proj.lora_A.weight")))),
            ("base_model.model.a.lora_A.other.weight", Err(PeftError::Unknown(name("base_model.model.a.lora_A.other.weight")))),
            ("base_model.model.a.lora_E", Err(PeftError::Unknown(name("base_model.model.a.lora_E")))),
            ("base_model.model.a.lora_B.bias", Err(PeftError::FactorBias(name("base_model.model.a.lora_B.bias")))),
            ("base_model.model.a.lora_magnitude_vector", Err(PeftError::Dora(name("base_model.model.a.lora_magnitude_vector")))),
            (
                "base_model.model.model.embed_tokens.lora_embedding_A",
                Err(PeftError::NotAdapted { name: name("base_model.model.model.embed_tokens.lora_embedding_A"), what: "embedding" }),
            ),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}
