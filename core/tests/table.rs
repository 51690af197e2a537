//! The table against a map that forgets nothing.
#![cfg(not(loom))]

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use pvblk::table::{Table, Tag};

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(u32),
    /// Removes one of the values that are there.
    Remove(usize),
    /// Uses a tag that was void before.
    Stale(usize),
    Get(usize),
    /// Uses an id that the peer made up.
    Forged(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => any::<u32>().prop_map(Step::Insert),
        3 => any::<usize>().prop_map(Step::Remove),
        1 => any::<usize>().prop_map(Step::Stale),
        1 => any::<usize>().prop_map(Step::Get),
        1 => any::<u64>().prop_map(Step::Forged),
        1 => (0..1_u64 << 34).prop_map(Step::Forged),
        1 => (0..80_u64).prop_map(Step::Forged),
    ];
    prop::collection::vec(step, 1..160)
}

proptest! {
    #[test]
    fn it_holds_what_a_map_holds(capacity in 0..20_u16, steps in steps()) {
        let mut table = Table::new(capacity);
        let mut map = HashMap::<u64, u32>::new();
        let (mut present, mut void) = (Vec::<Tag>::new(), Vec::<Tag>::new());
        for step in steps {
            match step {
                Step::Insert(value) => match table.insert(value) {
                    Ok(tag) => {
                        prop_assert!(map.len() < usize::from(capacity));
                        prop_assert!(tag.slot() < usize::from(capacity));
                        prop_assert!(!void.contains(&tag), "a void tag is used again at once");
                        prop_assert_eq!(map.insert(tag.to_id(), value), None);
                        present.push(tag);
                    }
                    Err(back) => {
                        prop_assert_eq!(back, value);
                        prop_assert_eq!(map.len(), usize::from(capacity));
                    }
                },
                Step::Remove(which) if !present.is_empty() => {
                    let tag = present.swap_remove(which % present.len());
                    prop_assert_eq!(table.remove(tag), map.remove(&tag.to_id()));
                    prop_assert_eq!(table.remove(tag), None, "a value leaves once");
                    void.push(tag);
                }
                Step::Stale(which) if !void.is_empty() => {
                    let tag = void[which % void.len()];
                    prop_assert_eq!(table.get_mut(tag), None);
                    prop_assert_eq!(table.remove(tag), None);
                }
                Step::Get(which) if !present.is_empty() => {
                    let tag = present[which % present.len()];
                    prop_assert_eq!(table.get_mut(tag).copied(), map.get(&tag.to_id()).copied());
                }
                Step::Forged(id) => {
                    let found = Tag::from_id(id).and_then(|tag| table.get_mut(tag)).copied();
                    prop_assert_eq!(found, map.get(&id).copied());
                }
                _ => {}
            }
            prop_assert_eq!(table.len(), map.len());
            prop_assert_eq!(table.is_empty(), map.is_empty());
            prop_assert_eq!(table.has_room(), map.len() < usize::from(capacity));
            let tags: HashSet<u64> = table.tags().map(Tag::to_id).collect();
            prop_assert_eq!(tags, map.keys().copied().collect::<HashSet<u64>>());
        }
        prop_assert_eq!(table.capacity(), usize::from(capacity));
    }

    #[test]
    fn an_id_survives_the_wire(id in any::<u64>()) {
        match Tag::from_id(id) {
            Some(tag) => prop_assert_eq!(tag.to_id(), id),
            None => prop_assert!(id > u64::from(u32::MAX)),
        }
    }
}

#[test]
fn ids_above_32_bits_name_nothing() {
    let mut table = Table::new(1);
    let tag = table.insert('a').unwrap();
    for bit in 32..64 {
        assert_eq!(Tag::from_id(tag.to_id() | 1 << bit), None, "bit {bit}");
    }
    assert_eq!(Tag::from_id(tag.to_id()), Some(tag));
}

#[test]
fn slots_past_the_end_hold_nothing() {
    let mut table = Table::new(3);
    for _ in 0..3 {
        table.insert(()).unwrap();
    }
    for slot in 3..=u64::from(u16::MAX) {
        let tag = Tag::from_id(slot).expect("32 bits");
        assert_eq!(table.get_mut(tag), None);
        assert_eq!(table.remove(tag), None);
    }
    assert_eq!(table.len(), 3);
}

#[test]
fn the_slot_freed_last_is_used_first() {
    let mut table = Table::new(8);
    let tags: Vec<Tag> = (0..5).map(|i| table.insert(i).unwrap()).collect();
    table.remove(tags[1]).unwrap();
    table.remove(tags[3]).unwrap();
    assert_eq!(table.insert(9).unwrap().slot(), tags[3].slot());
    assert_eq!(table.insert(9).unwrap().slot(), tags[1].slot());
}

#[test]
fn a_tag_is_void_until_its_generation_comes_round_after_65536_tenants() {
    let mut table = Table::new(1);
    let first = table.insert(0).unwrap();
    table.remove(first).unwrap();
    for tenant in 1..=u32::from(u16::MAX) {
        let tag = table.insert(tenant).unwrap();
        assert_eq!(table.get_mut(first), None, "tenant {tenant}");
        assert_eq!(table.remove(tag), Some(tenant));
        assert_eq!(table.get_mut(tag), None);
    }
    assert_eq!(table.insert(7).unwrap(), first, "the generation wraps, and nothing panics");
}

#[test]
fn the_largest_table_is_used_to_its_last_slot() {
    let mut table = Table::new(u16::MAX);
    let mut slots = HashSet::new();
    for value in 0..u16::MAX {
        assert!(slots.insert(table.insert(value).unwrap().slot()));
    }
    assert_eq!(table.insert(0), Err(0));
    assert!(!table.has_room());
    let last = table.tags().last().unwrap();
    assert!(table.remove(last).is_some());
    assert_eq!(table.insert(1).unwrap().slot(), last.slot());
}

#[test]
fn a_table_of_nothing_takes_nothing() {
    let mut table = Table::new(0);
    assert_eq!(table.insert(1), Err(1));
    assert!(!table.has_room() && table.is_empty());
    assert_eq!(table.tags().count(), 0);
}
