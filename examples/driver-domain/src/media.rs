//! What there is to serve from.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::task::Waker;

use pvblk::extent::Geometry;
use pvblk_xen::store::{Error, Store};
use xen_guest::{Guest, println};

use crate::arrivals::Arrivals;
use crate::export::Source;
use crate::medium::RamDisk;
use crate::own_disk::OwnDisk;
use crate::settings::Settings;
use crate::target::{Target, device_name};

/// RAM disks, and disks of this domain.
pub struct Media {
    guest: &'static Guest,
    /// The logical sector of RAM disks in bytes.
    sector: u32,
    /// By their names.
    ram: Vec<(String, RamDisk)>,
    /// Disks of this domain.
    pub own: Vec<OwnDisk>,
    /// Those that are on their way.
    arrivals: Arrivals,
}

impl Media {
    /// Makes the RAM disks of the command line, and begins to look for disks that the domain has.
    /// `waker` is woken when XenStore has something to say.
    pub fn open(
        guest: &'static Guest,
        store: &Store<&'static Guest>,
        settings: &Settings,
        waker: Waker,
    ) -> Result<Self, Error> {
        let arrivals = Arrivals::watch(guest, store, waker, settings.config.queues)?;
        let (sector, ram, own) = (settings.sector, Vec::new(), Vec::new());
        let mut media = Self { guest, sector, ram, own, arrivals };
        for (name, bytes) in &settings.ram {
            match media.new_ram(*bytes) {
                Ok(disk) => {
                    println!("{name}: {} MiB of memory", bytes >> 20);
                    media.ram.push((name.clone(), disk));
                }
                Err(reason) => println!("{name}: {reason}"),
            }
        }
        Ok(media)
    }

    /// Takes up disks that the domain has got. `true` if there are any.
    pub fn arrive(&mut self) -> Result<bool, Error> {
        let before = self.own.len();
        self.own.extend(self.arrivals.follow(&self.own)?);
        Ok(self.own.len() > before)
    }

    /// What `target` names.
    ///
    /// # Errors
    ///
    /// Why there is no such thing, in words.
    pub fn find(&mut self, target: &str) -> Result<Source, String> {
        match Target::parse(target) {
            None => Err(format!("target {target:?} is neither ramN, nor ram:SIZE, nor disk:xvdX")),
            Some(Target::Named(name)) => {
                let disk = self.ram.iter().find(|(other, _)| *other == name);
                let disk = disk.ok_or_else(|| format!("the command line has no {name}=SIZE"))?;
                Ok(Source::Ram(disk.1.clone()))
            }
            Some(Target::Private(bytes)) => self.new_ram(bytes).map(Source::Ram),
            Some(Target::Own(number)) => {
                let disk = self.own.iter_mut().find(|disk| disk.number == number);
                match disk {
                    None => Err(format!("this domain has no {} yet", device_name(number))),
                    Some(disk) if disk.is_leaving => Err(format!("{} goes", disk.name)),
                    Some(disk) if disk.is_taken => Err(format!("{} is in use", disk.name)),
                    Some(disk) => {
                        disk.is_taken = true;
                        Ok(Source::Own(number, disk.queues()))
                    }
                }
            }
        }
    }

    /// Takes back what [`find`](Self::find) gave. `true` if somebody else may have it now.
    pub fn release(&mut self, source: Source) -> bool {
        let number = source.own();
        drop(source);
        let disk = self.own.iter_mut().find(|disk| Some(disk.number) == number);
        disk.is_some_and(|disk| core::mem::take(&mut disk.is_taken))
    }

    /// Closes disks of this domain: all of them, or those that go and serve nobody any more.
    pub fn close(&mut self, all: bool) {
        self.own.retain_mut(|disk| {
            let ends = all || disk.is_leaving && !disk.is_taken;
            if ends {
                disk.close();
                self.arrivals.look_again();
            }
            !ends
        });
    }

    fn new_ram(&self, bytes: u64) -> Result<RamDisk, String> {
        let geometry = Geometry {
            sectors: bytes / 512,
            logical_bytes: self.sector,
            physical_bytes: 4096,
            read_only: false,
        };
        RamDisk::new(self.guest, geometry).map_err(|error| error.to_string())
    }
}
