//! What the router decides, free of IO: where chains are placed (`placement`), which executors a sequence runs on (`assembly`),
//! what follows when one is lost (`journal`, `loss`), who may call and see what (`tenants`), and how they share the door (`places`). Nothing here knows sockets, files, tasks,
//! clocks or dice.

pub mod assembly;
pub mod journal;
pub mod loss;
pub mod placement;
pub mod places;
pub mod tenants;
