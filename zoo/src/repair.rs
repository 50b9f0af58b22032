//! Mends what `verify` found, out of another zoo: every object but a name is known by its digest, so any zoo that has it has the same.

use serde::Serialize;

use crate::store::{Object, StoreError, Zoo};
use crate::verify::VerifyReport;

/// What [`repair`] did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepairReport {
    /// Objects that are sound now.
    pub repaired: Vec<String>,
    /// Objects that are not, and why.
    pub left: Vec<(String, String)>,
}

/// Writes anew what is damaged or missing in `zoo` from what `other` has of it, verified there. Names are never taken from elsewhere.
///
/// # Errors
/// When one of the stores fails in a way that says nothing about the objects.
pub async fn repair(zoo: &Zoo, other: &Zoo, report: &VerifyReport) -> Result<RepairReport, StoreError> {
    let mut done = RepairReport::default();
    for object in &report.broken {
        match copy(zoo, other, object).await {
            Ok(()) => done.repaired.push(object.to_string()),
            Err(StoreError::Missing { .. }) => done.left.push((object.to_string(), format!("{} does not have it", other.place()))),
            Err(error @ StoreError::Damaged { .. }) => {
                done.left.push((object.to_string(), format!("nor can {} give it: {error}", other.place())));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

async fn copy(zoo: &Zoo, other: &Zoo, object: &Object) -> Result<(), StoreError> {
    match object {
        Object::Tensor(digest) => {
            let (tensor, payload) = other.read_tensor(*digest).await?;
            zoo.rewrite_tensor(&tensor, payload).await
        }
        Object::Block(digest) => zoo.put_block(&other.read_block(*digest).await?).await.map(|_| ()),
        Object::Adapter(digest) => zoo.put_adapter(&other.read_adapter(*digest).await?).await.map(|_| ()),
        Object::Chain(digest) => zoo.put_chain(&other.read_chain(*digest).await?).await.map(|_| ()),
        Object::Asset(digest) => zoo.put_asset(other.read_asset(*digest).await?).await.map(|_| ()),
        Object::Base { tensor, base } => zoo.put_base(*tensor, *base).await,
        Object::Equivalence(digest) => zoo.put_equivalence(&other.read_equivalence(*digest).await?).await.map(|_| ()),
        // What another zoo measured on a device of the same kind.
        Object::Profile { block, device } => zoo.put_profile(&other.read_profile(*block, device).await?).await,
        // It is a function of its chain.
        Object::Sketch(chain) => zoo.make_sketch(*chain).await.map(|_| ()),
        Object::Measure { chain, record } => zoo.put_measure(*chain, &other.read_measure(*chain, *record).await?).await.map(|_| ()),
        Object::Format
        | Object::Domains
        | Object::Scratch(_)
        | Object::Model(_)
        | Object::TensorOf { .. }
        | Object::TensorOfAdapter { .. } => Err(StoreError::Missing { object: object.clone() }),
    }
}
