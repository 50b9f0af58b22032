//! Defects that the simulator plants to see whether its checkers catch them (docs/simulation.md). Nothing else does: no setting reaches
//! them, and `Engine::new` has none.

/// A planted defect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Canary {
    /// None.
    #[default]
    Healthy,
    /// A page is published before its last token is computed.
    PublishesEarly,
    /// Pages of a sequence that is gone come back while a batch in flight may still write to them.
    FreesInFlight,
    /// A page is given back while the next token still sees it.
    FreesInWindow,
    /// Pages of a sequence that went while a batch was in flight never come back.
    LeaksPages,
}

impl Canary {
    /// Tokens that a page may lack when it is published: none.
    pub(crate) fn early_tokens(self) -> u32 {
        u32::from(self == Self::PublishesEarly)
    }
}
