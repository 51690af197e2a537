//! The rows: frontends, as guests for `xl`.

use clap::ValueEnum;

use super::cells::Work;

/// What guests' kernels are told. Without the last two they look for a PCI bus, which no guest has,
/// and test ciphers that nobody uses: seconds of each boot under emulation.
const LINUX: &str = "console=hvc0 loglevel=1 pci=off cryptomgr.notests";

/// A driver to test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Front {
    /// Linux's blkfront in a PV guest
    LinuxPv,
    /// Linux's blkfront in a PVH guest
    LinuxPvh,
    /// Linux's blkfront in a 32-bit PVH guest
    #[value(name = "linux-pvh-32")]
    LinuxPvh32,
    /// Ours, in the unikernel
    XenBlkfront,
}

impl Front {
    /// As `target/matrix.json` and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LinuxPv => "linux-pv",
            Self::LinuxPvh => "linux-pvh",
            Self::LinuxPvh32 => "linux-pvh-32",
            Self::XenBlkfront => "xen-blkfront",
        }
    }

    /// As the table has it.
    pub fn title(self) -> &'static str {
        match self {
            Self::LinuxPv => "Linux PV",
            Self::LinuxPvh => "Linux PVH",
            Self::LinuxPvh32 => "Linux PVH, 32 bits",
            Self::XenBlkfront => "our unikernel",
        }
    }

    /// The guest's processor.
    pub fn arch(self) -> &'static str {
        if self.is_32_bit() { "i686" } else { "x86_64" }
    }

    /// Whether its guest has 32 bits, and so needs another emulator.
    pub fn is_32_bit(self) -> bool {
        self == Self::LinuxPvh32
    }

    /// Whether it is Linux that drives the disk.
    pub fn is_linux(self) -> bool {
        self != Self::XenBlkfront
    }

    /// Whether `work` is done with it.
    pub fn can(self, work: Work) -> bool {
        match work {
            Work::Everything => true,
            Work::Hostile | Work::NewRings => self == Self::XenBlkfront,
            // One kind of Linux guest is enough.
            _ => self == Self::LinuxPvh,
        }
    }

    /// The configuration for `xl create`, but for the disks.
    pub fn configuration(self, name: &str, words: &str) -> String {
        let kind = if self == Self::LinuxPv { "pv" } else { "pvh" };
        let own = match self {
            Self::XenBlkfront => {
                format!("kernel=\"/guests/unikernel\"\ncmdline=\"{words}\"\nmemory=256\n")
            }
            Self::LinuxPv | Self::LinuxPvh | Self::LinuxPvh32 => format!(
                "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/cell.cpio\"\n\
                 cmdline=\"{LINUX} {words}\"\nmemory=512\n"
            ),
        };
        // Preserved, so that the console's last words can be read before the domain goes.
        format!(
            "name=\"{name}\"\ntype=\"{kind}\"\n{own}vcpus=1\ntsc_mode=\"native\"\n\
             on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n"
        )
    }
}
