//! One guest to run: what it is asked for, and its configuration for `xl`.

/// What a guest is asked to negotiate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The guest's name, unique in a boot.
    pub name: String,
    /// Order of the shared ring's pages; the guest's default when absent.
    pub order: Option<u32>,
    /// Number of queues; the guest's default when absent.
    pub queues: Option<u32>,
    /// Whether the backend offers persistent grants.
    pub persistent: bool,
    /// Logical sector size of the disks in bytes.
    pub sector: u32,
    /// More words for the guest's command line.
    pub arguments: String,
    /// How long it may run.
    pub seconds: u32,
}

impl Case {
    /// What a guest gets when nothing particular is asked for.
    pub fn plain(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            order: None,
            queues: None,
            persistent: true,
            sector: 512,
            arguments: String::new(),
            seconds: 240,
        }
    }

    /// Every combination of persistent grants, ring order, queues and sector size.
    pub fn matrix() -> Vec<Self> {
        let mut cases = Vec::new();
        for sector in [512, 4096] {
            for persistent in [true, false] {
                for order in [0, 2, 4] {
                    for queues in [1, 4] {
                        let grants = if persistent { "persistent" } else { "mapped" };
                        cases.push(Self {
                            name: format!("{grants}-order{order}-queues{queues}-sector{sector}"),
                            order: Some(order),
                            queues: Some(queues),
                            persistent,
                            sector,
                            arguments: String::new(),
                            seconds: 180,
                        });
                    }
                }
            }
        }
        cases
    }

    /// The guest's command line.
    pub fn command_line(&self) -> String {
        let mut words = Vec::new();
        words.extend(self.order.map(|order| format!("order={order}")));
        words.extend(self.queues.map(|queues| format!("queues={queues}")));
        if !self.arguments.is_empty() {
            words.push(self.arguments.clone());
        }
        words.join(" ")
    }

    /// A line of the list that `disks.sh` reads.
    pub fn line(&self, console: Console) -> String {
        let how = match console {
            Console::Live => "live",
            Console::Later => "later",
            Console::Bytes => "bytes",
        };
        let Self { name, sector, seconds, .. } = self;
        format!("{name} {sector} {} {seconds} {how}\n", u8::from(self.persistent))
    }
}

/// How a guest's console comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Line by line, as it comes.
    Live,
    /// Line by line, when the guest has ended.
    Later,
    /// Byte by byte, when the guest has ended: there are frames between the lines.
    Bytes,
}

/// What kind of guest runs a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our unikernel: one vcpu, and time straight from the processor.
    Unikernel,
    /// Linux with its own blkfront.
    Linux,
}

impl Kind {
    /// The configuration file for `xl create`.
    pub fn configuration(self, case: &Case) -> String {
        let command_line = case.command_line();
        let own = match self {
            Self::Unikernel => format!(
                "kernel=\"/guests/unikernel\"\ncmdline=\"{command_line}\"\nmemory=256\nvcpus=1\n"
            ),
            Self::Linux => format!(
                "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/domu.cpio\"\n\
                 cmdline=\"console=hvc0 quiet {command_line}\"\nmemory=512\nvcpus={}\n",
                case.queues.unwrap_or(1)
            ),
        };
        // Preserved, so that the console's last words can be read before the domain goes.
        format!(
            "name=\"{}\"\ntype=\"pvh\"\n{own}tsc_mode=\"native\"\n\
             disk=[\"phy:/dev/loop0,xvda,r\", \"phy:/dev/loop1,xvdb,w\"]\n\
             on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n",
            case.name
        )
    }
}
