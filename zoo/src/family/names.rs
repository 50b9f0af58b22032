//! How checkpoints name the tensors of each role, and what must be done to get from theirs to ours: split fused
//! projections, transpose Conv1D, undo llama.cpp's permutation. All of it moves whole elements; nothing is computed.

use crate::manifest::BlockKind;

/// A naming scheme.
#[derive(Debug, Clone, PartialEq)]
pub enum Names {
    /// transformers' Llama and its kin.
    Llama {
        /// In front of `layers.0...`, `embed_tokens` and `norm`.
        body: String,
        /// In front of `lm_head`.
        head: String,
        /// Phi-3: `qkv_proj` and `gate_up_proj`.
        fused: bool,
        /// Gemma: norms before and after each half.
        sandwich: bool,
    },
    /// transformers' GPT-2, whose linear layers are Conv1D: `[inputs, outputs]`.
    Gpt2 {
        /// In front of `h.0...`, `wte`, `wpe` and `ln_f`.
        prefix: String,
    },
    /// GGUF.
    Gguf {
        /// Rows of q and k are interleaved within heads (architecture llama).
        permuted: bool,
        /// `attn_qkv`.
        fused_qkv: bool,
        /// `ffn_up` holds gate and up.
        fused_gate_up: bool,
    },
}

/// Where in the model a role is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The first block.
    Embed,
    /// The attention or feed-forward of a layer.
    Layer(u32),
    /// The last block.
    Head,
}

/// What of a source tensor makes the stored one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Name in the checkpoint.
    pub name: String,
    /// Whether the source is `[inputs, outputs]`.
    pub transposed: bool,
    /// Which rows (of the transposed matrix), or elements of a vector.
    pub rows: Rows,
}

/// A selection of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All, in order.
    All,
    /// From one up to before another.
    Range {
        /// First row.
        from: u64,
        /// Row after the last.
        to: u64,
        /// Rows that the source must have.
        of: u64,
    },
    /// All, with llama.cpp's order within each head undone.
    Unpermuted {
        /// Rows of a head.
        head_dim: u64,
    },
}

impl Names {
    /// What transformers names the modules of a family, within the model itself; by a chain's architecture.
    pub fn of_architecture(architecture: &str) -> Option<Self> {
        match architecture {
            "llama" | "mistral" | "qwen2" | "qwen3" | "gemma2" | "gemma3" | "phi3" => Some(Self::Llama {
                body: String::new(),
                head: String::new(),
                fused: architecture == "phi3",
                sandwich: architecture.starts_with("gemma"),
            }),
            "gpt2" => Some(Self::Gpt2 { prefix: String::new() }),
            _ => None,
        }
    }

    /// The source of a role.
    pub fn piece(&self, place: Place, params: &BlockKind, role: &str) -> Piece {
        match self {
            Self::Llama { body, head, fused, sandwich } => llama(body, head, *fused, *sandwich, place, params, role),
            Self::Gpt2 { prefix } => gpt2(prefix, place, params, role),
            Self::Gguf { permuted, fused_qkv, fused_gate_up } => gguf(*permuted, *fused_qkv, *fused_gate_up, place, params, role),
        }
    }

    /// Whether a tensor holds nothing that a model needs: masks and frequencies that old versions saved, other towers.
    pub fn ignores(&self, name: &str) -> bool {
        match self {
            Self::Llama { .. } => {
                let other_tower = ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];
                name.ends_with(".rotary_emb.inv_freq") || other_tower.iter().any(|prefix| name.starts_with(prefix))
            }
            Self::Gpt2 { .. } => name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"),
            Self::Gguf { .. } => matches!(name, "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight"),
        }
    }
}

fn llama(body: &str, head: &str, fused: bool, sandwich: bool, place: Place, params: &BlockKind, role: &str) -> Piece {
    let layer = match place {
        Place::Embed => return whole(format!("{body}embed_tokens.{}", suffix(role))),
        Place::Head if role == "output.weight" => return whole(format!("{head}lm_head.weight")),
        Place::Head => return whole(format!("{body}norm.{}", suffix(role))),
        Place::Layer(layer) => format!("{body}layers.{layer}"),
    };
    let attention = matches!(params, BlockKind::Attention { .. });
    let suffix = suffix(role);
    match (role.split('.').next().unwrap_or_default(), attention) {
        ("norm", true) => whole(format!("{layer}.input_layernorm.{suffix}")),
        ("norm", false) if sandwich => whole(format!("{layer}.pre_feedforward_layernorm.{suffix}")),
        ("norm", false) => whole(format!("{layer}.post_attention_layernorm.{suffix}")),
        ("post_norm", true) => whole(format!("{layer}.post_attention_layernorm.{suffix}")),
        ("post_norm", false) => whole(format!("{layer}.post_feedforward_layernorm.{suffix}")),
        ("q" | "k" | "v", true) if fused => part(format!("{layer}.self_attn.qkv_proj.{suffix}"), false, qkv_rows(params, role)),
        ("gate" | "up", false) if fused => part(format!("{layer}.mlp.gate_up_proj.{suffix}"), false, gate_up_rows(params, role)),
        (name @ ("q_norm" | "k_norm"), _) => whole(format!("{layer}.self_attn.{name}.{suffix}")),
        (name, true) => whole(format!("{layer}.self_attn.{name}_proj.{suffix}")),
        (name, false) => whole(format!("{layer}.mlp.{name}_proj.{suffix}")),
    }
}

fn gpt2(prefix: &str, place: Place, params: &BlockKind, role: &str) -> Piece {
    let layer = match place {
        Place::Embed if role == "position.weight" => return whole(format!("{prefix}wpe.weight")),
        Place::Embed => return whole(format!("{prefix}wte.weight")),
        Place::Head if role == "output.weight" => return whole("lm_head.weight".to_owned()),
        Place::Head => return whole(format!("{prefix}ln_f.{}", suffix(role))),
        Place::Layer(layer) => format!("{prefix}h.{layer}"),
    };
    let attention = matches!(params, BlockKind::Attention { .. });
    let suffix = suffix(role);
    let conv = suffix == "weight";
    match (role.split('.').next().unwrap_or_default(), attention) {
        ("norm", true) => whole(format!("{layer}.ln_1.{suffix}")),
        ("norm", false) => whole(format!("{layer}.ln_2.{suffix}")),
        ("o", _) => part(format!("{layer}.attn.c_proj.{suffix}"), conv, Rows::All),
        ("up", _) => part(format!("{layer}.mlp.c_fc.{suffix}"), conv, Rows::All),
        ("down", _) => part(format!("{layer}.mlp.c_proj.{suffix}"), conv, Rows::All),
        _ => part(format!("{layer}.attn.c_attn.{suffix}"), conv, qkv_rows(params, role)),
    }
}

fn gguf(permuted: bool, fused_qkv: bool, fused_gate_up: bool, place: Place, params: &BlockKind, role: &str) -> Piece {
    let suffix = suffix(role);
    let layer = match place {
        Place::Embed if role == "position.weight" => return whole("position_embd.weight".to_owned()),
        Place::Embed => return whole("token_embd.weight".to_owned()),
        Place::Head if role == "output.weight" => return whole("output.weight".to_owned()),
        Place::Head => return whole(format!("output_norm.{suffix}")),
        Place::Layer(layer) => format!("blk.{layer}"),
    };
    let attention = matches!(params, BlockKind::Attention { .. });
    match (role.split('.').next().unwrap_or_default(), attention) {
        ("norm", true) => whole(format!("{layer}.attn_norm.{suffix}")),
        ("norm", false) => whole(format!("{layer}.ffn_norm.{suffix}")),
        ("post_norm", true) => whole(format!("{layer}.post_attention_norm.{suffix}")),
        ("post_norm", false) => whole(format!("{layer}.post_ffw_norm.{suffix}")),
        ("q" | "k" | "v", true) if fused_qkv => part(format!("{layer}.attn_qkv.{suffix}"), false, qkv_rows(params, role)),
        (name @ ("q" | "k"), true) if permuted => part(format!("{layer}.attn_{name}.{suffix}"), false, unpermuted(params)),
        ("o", true) => whole(format!("{layer}.attn_output.{suffix}")),
        (name, true) => whole(format!("{layer}.attn_{name}.{suffix}")),
        ("gate" | "up", false) if fused_gate_up => part(format!("{layer}.ffn_up.{suffix}"), false, gate_up_rows(params, role)),
        (name, false) => whole(format!("{layer}.ffn_{name}.{suffix}")),
    }
}

fn whole(name: String) -> Piece {
    part(name, false, Rows::All)
}

fn part(name: String, transposed: bool, rows: Rows) -> Piece {
    Piece { name, transposed, rows }
}

/// `weight` or `bias`.
fn suffix(role: &str) -> &str {
    role.rsplit('.').next().unwrap_or(role)
}

fn qkv_rows(params: &BlockKind, role: &str) -> Rows {
    let BlockKind::Attention { heads, kv_heads, head_dim, .. } = params else { return Rows::All };
    let (q, kv) = (u64::from(*heads) * u64::from(*head_dim), u64::from(*kv_heads) * u64::from(*head_dim));
    let (from, to) = match role.as_bytes()[0] {
        b'q' => (0, q),
        b'k' => (q, q + kv),
        _ => (q + kv, q + 2 * kv),
    };
    Rows::Range { from, to, of: q + 2 * kv }
}

fn gate_up_rows(params: &BlockKind, role: &str) -> Rows {
    let BlockKind::FeedForward { inner, .. } = params else { return Rows::All };
    let inner = u64::from(*inner);
    let from = if role.starts_with("gate") { 0 } else { inner };
    Rows::Range { from, to: from + inner, of: 2 * inner }
}

fn unpermuted(params: &BlockKind) -> Rows {
    match params {
        BlockKind::Attention { head_dim, .. } => Rows::Unpermuted { head_dim: u64::from(*head_dim) },
        _ => Rows::All,
    }
}
