//! The NBD project's own server, which flushes only if its configuration says so. Where it is not
//! installed, nothing is tested.
#![allow(missing_docs)]

mod common;

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::*;
use pvblkd::options::DiskOptions;
use pvblkd::toolstack::{NewDisk, Wanted};
use rustix::process::{Pid, Signal, kill_process};

struct Server {
    pid: Pid,
    port: u16,
}

impl Server {
    /// `None` if it is not installed. `settings` are those of the export.
    fn start(folder: &Path, settings: &str) -> Option<Self> {
        let image = folder.join("disk.img");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (config, pid) = (folder.join("config"), folder.join("pid"));
        let text = format!(
            "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\n[disk]\nexportname = {}\n{settings}",
            image.display()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new("nbd-server");
        command.arg("-C").arg(config).arg("-p").arg(&pid).stdin(Stdio::null());
        // It goes to the background by itself.
        if command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            println!("skipped: nbd-server is not installed");
            return None;
        }
        let read = || std::fs::read_to_string(&pid).ok()?.trim().parse().ok();
        eventually("the server runs", || read().is_some());
        let pid = read().and_then(Pid::from_raw).unwrap();
        eventually("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(Self { pid, port })
    }

    fn disk(&self, options: DiskOptions) -> NewDisk {
        let source = format!("nbd://127.0.0.1:{}/disk", self.port).parse().unwrap();
        NewDisk { place: place(XVDB), source, options }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::TERM);
    }
}

#[test]
fn a_server_that_makes_nothing_durable_is_told_or_refused() {
    for (settings, is_weak) in [("", true), ("flush = true\n", false), ("fua = true\n", false)] {
        let folder = tempfile::tempdir().unwrap();
        let Some(server) = Server::start(folder.path(), settings) else { return };
        let host = host();
        let daemon = Running::start(&host, &folder.path().join("run"));
        let patience = Duration::from_secs(60);
        attach_only(&host, &server.disk(DiskOptions::default())).unwrap();
        let warning = wait_for(&host, &place(XVDB), Wanted::Open, patience).unwrap();
        let words = "can make no write durable";
        let is_told = warning.as_ref().is_some_and(|warning| warning.contains(words));
        assert_eq!(is_told, is_weak, "{settings:?}: {warning:?}");
        let report = daemon.wait("open", |disk| disk.sectors == 2048);
        assert_eq!(report.warning.contains(words), is_weak, "{settings:?}");
        detach(&host, &place(XVDB), false).unwrap();

        let strict = DiskOptions { require_flush: Some(true), ..DiskOptions::default() };
        let result = attach(&host, &server.disk(strict));
        assert_eq!(result.is_err(), is_weak, "{settings:?}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains("require-flush"), "{error}");
        }
        daemon.stop();
    }
}
