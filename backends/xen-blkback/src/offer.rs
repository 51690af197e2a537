//! What a frontend published: where its rings are.
//!
//! All of it is an allegation. Every number is bounded before anything is computed from it, and
//! what cannot be is refused, with the words for the frontend's owner.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pvblk_xen::abi::{Abi, Abi32, Abi64};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::platform::{DomainId, GrantRef, Port};
use pvblk_xen::store::{Error as StoreError, Nodes};

use crate::config::Config;
use crate::device::is_peers_doing;
use crate::publish::Limits;
use crate::queue::QueuePlan;
use crate::restricted::Restrictions;

/// What both ends of Arm call it (`xen/include/public/io/protocols.h`). The layout is the 64-bit
/// one.
const ARM_PROTOCOL: &str = "arm-abi";

fn layout_of(protocol: &str) -> Option<Layout> {
    match protocol {
        ARM_PROTOCOL => Some(Layout::Bits64),
        _ if protocol == Abi64::PROTOCOL => Some(Layout::Bits64),
        _ if protocol == Abi32::PROTOCOL => Some(Layout::Bits32),
        _ => None,
    }
}

/// Why a frontend is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A node that must be there is not, or must not be read by us.
    #[error("{0} is missing")]
    Missing(String),
    /// A node holds something that is not a decimal number of 32 bits.
    #[error("{0} is not a number")]
    NotANumber(String),
    /// `protocol` names none that exists.
    #[error("unknown protocol {0:?}")]
    Protocol(String),
    /// There are no queues, or more than were offered.
    #[error("{asked} queues, where 1 to {most} are possible")]
    Queues {
        /// How many there are.
        asked: u32,
        /// `multi-queue-max-queues`
        most: u32,
    },
    /// The rings are larger than was offered.
    #[error("rings of page order {asked}, where at most {most} is possible")]
    RingOrder {
        /// Which order they have.
        asked: u32,
        /// `max-ring-page-order`
        most: u32,
    },
    /// Two pages of rings are the same.
    #[error("grant reference {0} is named for two pages of rings")]
    SamePage(u32),
    /// Two queues have the same event channel.
    #[error("event channel {0} is named for two queues")]
    SamePort(u32),
    /// The owner of the vbd refused it.
    #[error("{0}")]
    Owner(String),
}

/// How a frontend's nodes are understood.
pub(crate) struct Terms<'c> {
    pub peer: DomainId,
    /// What the frontend was told.
    pub limits: Limits,
    pub secure_discard: bool,
    pub restrictions: Restrictions,
    /// Whether an earlier backend may have served the rings.
    pub takeover: bool,
    pub config: &'c Config,
}

/// Why a frontend's nodes gave no plan.
pub(crate) enum Problem {
    Store(StoreError),
    Refused(Refusal),
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Reads what the frontend published in `frontend`.
///
/// Which form the nodes have is told by which are there, as Linux's backend does it: one queue has
/// them at the top, several in `queue-N`; a ring is in `ring-ref` unless there is a
/// `ring-page-order`, even of 0, and then in `ring-refN`.
pub(crate) fn read(
    nodes: &impl Nodes,
    frontend: &str,
    terms: &Terms<'_>,
) -> Result<Vec<QueuePlan>, Problem> {
    let reader = Reader { nodes, frontend };
    let layout = reader.layout(terms.config.missing_protocol)?;
    let asked = reader.number("multi-queue-num-queues")?.unwrap_or(1);
    let most = terms.limits.queues;
    if asked == 0 || asked > most {
        return Err(Refusal::Queues { asked, most }.into());
    }
    let order = reader.number("ring-page-order")?;
    let most = terms.limits.ring_order;
    if let Some(asked) = order.filter(|order| *order > most) {
        return Err(Refusal::RingOrder { asked, most }.into());
    }
    let persistent = terms.limits.persistent && reader.flag("feature-persistent")?;
    let segments = terms.limits.indirect_segments;
    let offer =
        Offer { indirect_segments: segments as usize, secure_discard: terms.secure_discard };

    let mut plans = Vec::new();
    for number in 0..asked {
        let at = queue(number, asked);
        plans.push(QueuePlan {
            number: number as usize,
            peer: terms.peer,
            references: reader.references(&at, order)?,
            port: Port(reader.required(&format!("{at}event-channel"))?),
            layout,
            offer,
            reach: terms.config.reach(persistent, segments),
            restrictions: terms.restrictions,
            takeover: terms.takeover,
        });
    }
    check_distinct(&plans)?;
    Ok(plans)
}

/// Reads the event channel of the first of `queues` queues alone.
pub(crate) fn first_channel(
    nodes: &impl Nodes,
    frontend: &str,
    queues: usize,
) -> Result<Port, Problem> {
    let at = queue(0, queues as u32);
    Reader { nodes, frontend }.required(&format!("{at}event-channel")).map(Port)
}

/// Where the nodes of a queue are.
fn queue(number: u32, queues: u32) -> String {
    if queues == 1 { String::new() } else { format!("queue-{number}/") }
}

/// A page that is in two rings, or twice in one, would be changed behind the backend's back by
/// itself.
fn check_distinct(plans: &[QueuePlan]) -> Result<(), Refusal> {
    let references = plans.iter().flat_map(|plan| &plan.references).map(|reference| reference.0);
    if let Some(reference) = repeated(references.collect()) {
        return Err(Refusal::SamePage(reference));
    }
    match repeated(plans.iter().map(|plan| plan.port.0).collect()) {
        Some(port) => Err(Refusal::SamePort(port)),
        None => Ok(()),
    }
}

fn repeated(mut numbers: Vec<u32>) -> Option<u32> {
    numbers.sort_unstable();
    numbers.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

struct Reader<'n, N> {
    nodes: &'n N,
    frontend: &'n str,
}

impl<N: Nodes> Reader<'_, N> {
    fn path(&self, node: &str) -> String {
        format!("{}/{node}", self.frontend)
    }

    fn number(&self, node: &str) -> Result<Option<u32>, Problem> {
        match self.nodes.read_u32(&self.path(node)) {
            Err(StoreError::BadValue { .. }) => Err(Refusal::NotANumber(node.into()).into()),
            Err(error) if is_peers_doing(&error) => Err(Refusal::Missing(node.into()).into()),
            result => Ok(result?),
        }
    }

    fn required(&self, node: &str) -> Result<u32, Problem> {
        self.number(node)?.ok_or_else(|| Refusal::Missing(node.into()).into())
    }

    /// A feature that is offered by anything but 0. Nonsense offers nothing.
    fn flag(&self, node: &str) -> Result<bool, Problem> {
        match self.nodes.read_u32(&self.path(node)) {
            Err(error) if is_peers_doing(&error) => Ok(false),
            result => Ok(result?.unwrap_or(0) != 0),
        }
    }

    fn layout(&self, missing: Layout) -> Result<Layout, Problem> {
        let protocol = match self.nodes.read_optional(&self.path("protocol")) {
            Err(error) if is_peers_doing(&error) => {
                return Err(Refusal::Protocol("?".into()).into());
            }
            result => result?,
        };
        let Some(protocol) = protocol else { return Ok(missing) };
        layout_of(&protocol).ok_or_else(|| {
            // Only the beginning: it goes into an error node and into messages.
            let shown: String = protocol.chars().take(32).collect();
            Refusal::Protocol(shown).into()
        })
    }

    /// `order` was checked.
    fn references(&self, at: &str, order: Option<u32>) -> Result<Vec<GrantRef>, Problem> {
        let pages = 1_u32 << order.unwrap_or(0);
        (0..pages)
            .map(|page| {
                let number = order.map_or_else(String::new, |_| page.to_string());
                self.required(&format!("{at}ring-ref{number}")).map(GrantRef)
            })
            .collect()
    }
}
