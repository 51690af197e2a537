//! What a disk is called, and how it is to be served: by its own settings and those of the configuration.

use anyhow::Result;
use pvblk_xen::store::Nodes;
use xen_blkback::Address;

use super::Served;
use crate::config::Config;
use crate::host::Host;
use crate::logging;
use crate::options::DiskOptions;
use crate::source::Source;
use crate::status::disk_name;
use crate::toolstack;
use crate::vdev::VirtualDevice;

impl<H: Host> Served<'_, H> {
    /// The configuration has changed. What cannot change under a guest that runs is said.
    pub fn reload(&mut self) {
        let (options, misfit) = settings(&self.common.config(), self.own.as_deref(), &self.params);
        if self.options.limits() != options.limits() {
            log::info!("{}: its limits have changed", self.path());
            self.status.limiter().set(options.limits());
            let DiskOptions { iops, bps, burst, .. } = options;
            self.options = DiskOptions { iops, bps, burst, ..self.options.clone() };
        }
        let changed = self.options.differences(&options);
        if changed.is_empty() && misfit == self.misfit {
            return;
        }
        if self.medium.backing().is_none() {
            // Nothing was opened with the old ones; and what was wrong may be right now.
            (self.options, self.misfit) = (options, misfit);
            return self.reopen_medium();
        }
        log::warn!(
            "{}: {} changed: that counts when the disk is attached again, or its guest is started again",
            self.path(),
            changed.join(", ")
        );
    }
}

/// What the guest of a disk is called. Messages call the disk by that, too.
pub(super) fn identify(store: &impl Nodes, address: &Address) -> String {
    let guest = toolstack::domain_name(store, address.frontend_id);
    let device = VirtualDevice(address.virtual_device);
    logging::name(&address.path, disk_name(&guest, address.frontend_id.0, device));
    guest
}

/// The settings of a disk: those that it was given, then those of the configuration. And why it cannot
/// be served with them, if so: none is left out silently.
pub(super) fn settings(
    config: &Config,
    own: Option<&str>,
    params: &str,
) -> (DiskOptions, Option<String>) {
    let source = params.parse::<Source>().ok();
    let read = |text: &str| -> Result<DiskOptions> {
        let options = DiskOptions::from_node(text)?;
        options.check()?;
        if let Some(source) = &source {
            options.check_source(source)?;
        }
        Ok(options)
    };
    let own = own.map(read).transpose();
    let misfit = own.as_ref().err().map(|error| format!("the settings of the disk: {error:#}"));
    let own = own.ok().flatten().unwrap_or_default();
    let mut options = match &source {
        Some(source) => own.or(&config.options(source)),
        None => own.or(&config.defaults),
    };
    if params.starts_with("nbd") {
        // Many servers allow one connection, and that is known too late to offer fewer.
        options.queues.get_or_insert(1);
    }
    (options, misfit)
}
