//! What there is to serve from.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pvblk::extent::Geometry;
use pvblk_xen::store::Store;
use pvblk_xen::xenbus;
use xen_guest::{Guest, println};

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
}

impl Media {
    /// Makes the RAM disks of the command line, and connects the disks that the domain has.
    pub fn open(
        guest: &'static Guest,
        store: &'static Store<'static, Guest>,
        settings: &Settings,
    ) -> Self {
        let mut media = Self { guest, sector: settings.sector, ram: Vec::new(), own: Vec::new() };
        for (name, bytes) in &settings.ram {
            match media.new_ram(*bytes) {
                Ok(disk) => {
                    println!("{name}: {} MiB of memory", bytes >> 20);
                    media.ram.push((name.clone(), disk));
                }
                Err(reason) => println!("{name}: {reason}"),
            }
        }
        let numbers = xenbus::devices(store, "vbd").unwrap_or_else(|error| {
            println!("own disks: {error}");
            Vec::new()
        });
        for number in numbers {
            match OwnDisk::connect(store, guest, number, settings.config.queues) {
                Ok(disk) => {
                    println!("{disk}: connected");
                    media.own.push(disk);
                }
                Err(reason) => println!("own {}: {reason}", device_name(number)),
            }
        }
        media
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
                    None => Err(format!("this domain has no {}", device_name(number))),
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
