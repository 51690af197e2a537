//! Programs that are killed, domains that crash, and what the others notice.

use pvblk::memory::{Access, PageAllocator};
use pvblk_simulated::{Domain, Host, Vbd};
use pvblk_xen::platform::{
    DomainId, EventChannels, EventError, ForeignError, ForeignGrants, GrantRef, Grants,
    MapOperation, MappedPage, Port, StillMapped, StoreTransport,
};
use pvblk_xen::store::{Error, Nodes, Store};

const BACK: DomainId = DomainId(0);
const FRONT: DomainId = DomainId(5);

fn map(domain: &Domain, reference: GrantRef) -> Result<MappedPage, ForeignError> {
    let mut operations = [MapOperation::new(reference, Access::ReadWrite)];
    domain.map(FRONT, &mut operations);
    operations[0].result
}

/// A backend that mapped a page and bound a port.
struct Connected {
    host: Host,
    front: Domain,
    far: Port,
    reference: GrantRef,
    back: Domain,
    near: Port,
    mapped: MappedPage,
}

fn connected() -> Connected {
    let host = Host::new(1);
    let (front, back) = (host.domain(FRONT), host.domain(BACK));
    let page = front.allocate_pages(1).unwrap();
    let reference = front.grant(BACK, page, Access::ReadWrite).unwrap();
    let far = front.allocate_unbound(BACK).unwrap();
    let near = back.bind_interdomain(FRONT, far).unwrap();
    let mapped = map(&back, reference).unwrap();
    back.allocate_pages(3).unwrap();
    Connected { host, front, far, reference, back, near, mapped }
}

#[test]
fn a_killed_backend_leaves_nothing_but_nodes() {
    let all = connected();
    all.host.store_write("/local/domain/0/backend/vbd/5/51712/state", "4");
    all.host.kill_program(BACK);
    assert!(!all.back.is_alive() && all.front.is_alive());
    all.back.assert_nothing_left();
    assert_eq!(all.front.statistics().mapped_by_peers, 0);
    assert_eq!(
        all.host.store_read("/local/domain/0/backend/vbd/5/51712/state").as_deref(),
        Some("4")
    );

    // What is left of it can be dropped, and has no effect.
    // SAFETY: nobody uses the page any more.
    unsafe { all.back.unmap(&[all.mapped]) };
    all.back.close(all.near);
    assert_eq!(all.back.bind_interdomain(FRONT, all.far), Err(EventError::Refused));
    assert_eq!(map(&all.back, all.reference), Err(ForeignError::Refused));
    assert!(all.back.send(&[0; 16]).is_err());
    assert!(all.back.allocate_pages(1).is_none());

    // The next program of the domain goes on where it was.
    let next = all.host.domain(BACK);
    let near = next.bind_interdomain(FRONT, all.far).unwrap();
    next.unmask(near);
    assert!(next.take(near), "a signal that came meanwhile is not lost");
    all.front.unmask(all.far);
    next.notify(near);
    assert!(all.front.take(all.far));
    let mapped = map(&next, all.reference).unwrap();
    assert_eq!(all.front.try_end(all.reference), Err(StillMapped));
    // SAFETY: mapped just above, used by nobody.
    unsafe { next.unmap(&[mapped]) };
    assert_eq!(all.front.try_end(all.reference), Ok(()));
}

#[test]
fn a_killed_programs_watches_are_gone() {
    let host = Host::new(1);
    let back = host.domain(BACK);
    let store = Store::new(&back);
    let _watch = store.watch("/local/domain/5").unwrap();
    host.kill_program(BACK);
    assert!(matches!(store.read("domid"), Err(Error::Broken(_))), "{:?}", store.read("domid"));
    let next = host.domain(BACK);
    host.store_write("/local/domain/5/x", "1");
    let mut bytes = [0; 64];
    assert_eq!(next.receive(&mut bytes), Ok(0));
}

#[test]
fn a_crashed_frontends_pages_stay_while_they_are_mapped() {
    let all = connected();
    let watch = all.host.store_watch("/local/domain/5");
    watch.take_changes();
    all.host.crash_domain(FRONT);
    assert!(!watch.take_changes(), "its nodes are for the toolstack to remove");
    // SAFETY: mapped, and used by this thread only.
    unsafe { all.mapped.address.as_ptr().write_volatile(9) };
    let left = all.front.statistics();
    assert_eq!((left.pages, left.ports, left.grants, left.mapped_by_peers), (0, 0, 1, 1));
    assert_eq!(map(&all.back, all.reference), Err(ForeignError::Refused));
    all.back.notify(all.near);
    // SAFETY: mapped once, used by nobody any more.
    unsafe { all.back.unmap(&[all.mapped]) };
    all.front.assert_nothing_left();
    all.back.close(all.near);
    assert!(!all.host.domain(FRONT).is_alive(), "a domain's number is not used again");
}

#[test]
fn a_backend_hears_of_deaths() {
    let host = Host::new(1);
    let (back, _front) = (host.domain(BACK), host.domain(FRONT));
    host.add_actor(Box::new(|| false));
    let store = Store::new(&back);
    let watch = store.watch("@releaseDomain").unwrap();
    while store.take(watch) {}
    host.crash_domain(FRONT);
    store.poll().unwrap();
    assert!(store.take(watch));
}

#[test]
fn a_driver_domain_serves_from_its_own_folder() {
    let host = Host::new(1);
    host.add_actor(Box::new(|| false));
    let (driver, stranger) = (host.domain(DomainId(2)), host.domain(DomainId(3)));
    let vbd = Vbd::new(DomainId(2), FRONT, 51712);
    host.attach_vbd(&vbd);
    assert_eq!(vbd.backend_path(), "/local/domain/2/backend/vbd/5/51712");

    let store = Store::new(&driver);
    assert_eq!(store.read("backend/vbd/5/51712/frontend-id").unwrap().as_str(), "5");
    let front_state = format!("{}/state", vbd.frontend_path());
    assert_eq!(store.read(&front_state).unwrap().as_str(), "1");
    let watch = store.watch(&front_state).unwrap();
    while store.take(watch) {}
    host.store_write(&front_state, "3");
    store.poll().unwrap();
    assert!(store.take(watch));
    store.write("backend/vbd/5/51712/state", "2").unwrap();
    assert!(Store::new(&stranger).read(&front_state).is_err());

    // `xl destroy` of the frontend.
    host.crash_domain(FRONT);
    host.detach_all_vbds(FRONT);
    assert_eq!(store.read("backend/vbd/5/51712/online").unwrap().as_str(), "0");
    assert_eq!(store.read("backend/vbd/5/51712/state").unwrap().as_str(), "5");
    host.forget_domain(FRONT);
    assert!(store.read(&front_state).is_err());
    // A driver domain removes its own.
    store.remove("backend/vbd/5/51712").unwrap();
}

#[test]
fn what_is_detached_is_not_brought_back() {
    let host = Host::new(1);
    let vbd = Vbd::new(BACK, FRONT, 51728);
    host.attach_vbd(&vbd);
    host.detach_vbd(&vbd);
    let node = |name: &str| host.store_read(&format!("{}/{name}", vbd.backend_path()));
    assert_eq!(node("online").as_deref(), Some("0"));
    assert_eq!(node("state").as_deref(), Some("5"));
    host.remove_vbd(&vbd);
    host.detach_vbd(&vbd);
    assert_eq!(node("state"), None);
    assert!(host.store_list("/local/domain/5/device/vbd").unwrap().is_empty());
}
