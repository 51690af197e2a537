//! What `xl` and libxl do with XenStore: disks added and removed, domains cleaned up after.

use pvblk_xen::platform::DomainId;

use crate::Host;

/// A disk of a domain, as its `xl` configuration describes it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Vbd {
    /// The domain that serves it.
    pub backend: DomainId,
    /// The domain that uses it.
    pub frontend: DomainId,
    /// `virtual-device`; 51712 is `xvda`.
    pub number: u32,
    /// The folder below `backend`: `vbd`, `qdisk`, or one that a tool chose itself.
    pub class: String,
    /// `type`: `phy`, `file`, `qdisk`.
    pub kind: String,
    /// `dev`, the name that the frontend's user knows.
    pub name: String,
    /// What is behind it.
    pub params: String,
    /// The hotplug script's path.
    pub script: Option<String>,
    /// `mode` is `r`, not `w`.
    pub read_only: bool,
    /// `device-type` is `cdrom`, not `disk`.
    pub cdrom: bool,
    /// `removable`
    pub removable: bool,
    /// `bootable`
    pub bootable: bool,
    /// `discard-enable`, if the configuration says anything about it.
    pub discard: Option<bool>,
    /// `direct-io-safe`
    pub direct_io_safe: bool,
    /// The frontend's `trusted`, if the configuration says anything about it.
    pub trusted: Option<bool>,
    /// `online` at first. It is 1 but for a disk that is to vanish at its first closing.
    pub online: bool,
}

impl Vbd {
    /// A writable disk in the folder `vbd`.
    pub fn new(backend: DomainId, frontend: DomainId, number: u32) -> Self {
        Self {
            backend,
            frontend,
            number,
            class: "vbd".into(),
            kind: "phy".into(),
            name: "xvda".into(),
            params: "simulated".into(),
            script: None,
            read_only: false,
            cdrom: false,
            removable: false,
            bootable: true,
            discard: None,
            direct_io_safe: false,
            trusted: None,
            online: true,
        }
    }

    /// The backend's directory.
    pub fn backend_path(&self) -> String {
        let (back, front) = (self.backend.0, self.frontend.0);
        format!("/local/domain/{back}/backend/{}/{front}/{}", self.class, self.number)
    }

    /// The frontend's directory. It is `device/vbd` whatever the backend's class is.
    pub fn frontend_path(&self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.frontend.0, self.number)
    }

    /// Where libxl remembers the disk, out of reach of both ends.
    fn library_path(&self) -> String {
        format!("{}/{}", library_devices(self.frontend), self.number)
    }

    fn backend_nodes(&self) -> Vec<(&str, String)> {
        let mut nodes = vec![
            ("frontend", self.frontend_path()),
            ("frontend-id", self.frontend.0.to_string()),
            ("online", digit(self.online)),
            ("removable", digit(self.removable)),
            ("bootable", digit(self.bootable)),
            ("dev", self.name.clone()),
            ("type", self.kind.clone()),
            ("mode", if self.read_only { "r" } else { "w" }.into()),
            ("device-type", self.device_type().into()),
            ("params", self.params.clone()),
        ];
        nodes.extend(self.script.clone().map(|script| ("script", script)));
        nodes.extend(self.discard.map(|discard| ("discard-enable", digit(discard))));
        if self.direct_io_safe {
            nodes.push(("direct-io-safe", digit(true)));
        }
        nodes
    }

    fn frontend_nodes(&self) -> Vec<(&str, String)> {
        let mut nodes = vec![
            ("backend", self.backend_path()),
            ("backend-id", self.backend.0.to_string()),
            ("virtual-device", self.number.to_string()),
            ("device-type", self.device_type().into()),
        ];
        nodes.extend(self.trusted.map(|trusted| ("trusted", digit(trusted))));
        nodes
    }

    fn device_type(&self) -> &'static str {
        if self.cdrom { "cdrom" } else { "disk" }
    }
}

fn digit(flag: bool) -> String {
    if flag { "1" } else { "0" }.into()
}

fn library_devices(frontend: DomainId) -> String {
    format!("/libxl/{}/device/vbd", frontend.0)
}

impl Host {
    /// Adds a disk: writes both ends' nodes, in one transaction, both in state 1 (Initialising).
    /// What a hotplug script writes (`hotplug-status`, `physical-device`) is not among them.
    pub fn attach_vbd(&self, vbd: &Vbd) {
        // Both homes must be there before the nodes are.
        self.domain(vbd.backend);
        self.domain(vbd.frontend);
        let (back, front, library) = (vbd.backend_path(), vbd.frontend_path(), vbd.library_path());
        let mut nodes: Vec<(String, String)> = Vec::new();
        let mut add = |directory: &str, name: &str, value: String| {
            nodes.push((format!("{directory}/{name}"), value));
        };
        for (name, value) in vbd.backend_nodes() {
            add(&back, name, value);
        }
        for (name, value) in vbd.frontend_nodes() {
            add(&front, name, value);
        }
        add(&library, "backend", back.clone());
        add(&library, "frontend", front.clone());
        add(&back, "state", "1".into());
        add(&front, "state", "1".into());
        self.write_texts(&nodes);
    }

    /// Asks the backend to close a disk for good: `online` 0 and `state` 5, in one transaction.
    ///
    /// The backend is done when its state is 6; then comes [`remove_vbd`](Self::remove_vbd).
    pub fn detach_vbd(&self, vbd: &Vbd) {
        self.detach(&vbd.backend_path());
    }

    fn detach(&self, backend_path: &str) {
        // A backend that is gone already must not come back as a folder of two nodes.
        if self.store_read(&format!("{backend_path}/state")).is_none() {
            return;
        }
        self.write_texts(&[
            (format!("{backend_path}/online"), "0".into()),
            (format!("{backend_path}/state"), "5".into()),
        ]);
    }

    /// Removes the nodes of a disk: the frontend's, and the backend's if that is domain 0. A
    /// driver domain removes its own.
    pub fn remove_vbd(&self, vbd: &Vbd) {
        self.store_remove(&vbd.frontend_path());
        self.store_remove(&vbd.library_path());
        if vbd.backend.0 == 0 {
            self.store_remove(&vbd.backend_path());
        }
    }

    /// The first half of `xl destroy`: asks the backends of all of a domain's disks to close them
    /// for good, as [`detach_vbd`](Self::detach_vbd) does.
    ///
    /// The backends are done when their states are 6; then comes
    /// [`forget_domain`](Self::forget_domain).
    pub fn detach_all_vbds(&self, id: DomainId) {
        for backend_path in self.backend_paths(id) {
            self.detach(&backend_path);
        }
    }

    /// The second half of `xl destroy`: removes what XenStore has of a domain, and of its disks'
    /// backends in domain 0. A driver domain removes its own.
    pub fn forget_domain(&self, id: DomainId) {
        for backend_path in self.backend_paths(id) {
            if backend_path.starts_with("/local/domain/0/") {
                self.store_remove(&backend_path);
            }
        }
        self.store_remove(&format!("/libxl/{}", id.0));
        self.store_remove(&format!("/local/domain/{}", id.0));
    }

    /// The backend directories of a domain's disks, from where no guest can write.
    fn backend_paths(&self, frontend: DomainId) -> Vec<String> {
        let devices = library_devices(frontend);
        let numbers = self.store_list(&devices).unwrap_or_default();
        let path = |number: &String| self.store_read(&format!("{devices}/{number}/backend"));
        numbers.iter().filter_map(path).collect()
    }

    fn write_texts(&self, nodes: &[(String, String)]) {
        let nodes: Vec<_> =
            nodes.iter().map(|(path, value)| (path.as_str(), value.as_bytes())).collect();
        self.store_write_all(&nodes);
    }
}
