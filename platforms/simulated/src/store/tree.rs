//! The nodes. Paths are absolute; the root is the empty string.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Bound;
use std::sync::Arc;

use super::StoreError;

/// The longest absolute path (`XENSTORE_ABS_PATH_MAX`).
const PATH_MAX: usize = 3072;

/// Cheap to clone, as a transaction does.
#[derive(Clone)]
pub(super) struct Tree {
    nodes: Arc<BTreeMap<String, Arc<[u8]>>>,
}

pub(super) fn is_valid(path: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    path.is_empty()
        || (path.len() <= PATH_MAX
            && path.starts_with('/')
            && !path.ends_with('/')
            && !path.contains("//")
            && path.bytes().all(legal))
}

pub(super) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { nodes: Arc::new(BTreeMap::from([(String::new(), Arc::from(&b""[..]))])) }
    }

    pub(super) fn read(&self, path: &str) -> Option<&[u8]> {
        self.nodes.get(path).map(|value| &value[..])
    }

    /// Writes a node, and the parents that do not exist. Gives the paths of the new nodes.
    pub(super) fn write(&mut self, path: &str, value: &[u8]) -> Vec<String> {
        let nodes = Arc::make_mut(&mut self.nodes);
        let mut made = Vec::new();
        if nodes.insert(path.to_string(), Arc::from(value)).is_none() {
            made.push(path.to_string());
        }
        let mut above = parent(path);
        while !nodes.contains_key(above) {
            nodes.insert(above.to_string(), Arc::from(&b""[..]));
            made.push(above.to_string());
            above = parent(above);
        }
        made
    }

    /// Removes a node and everything below it. Says whether it was there.
    pub(super) fn remove(&mut self, path: &str) -> bool {
        if path.is_empty() || !self.nodes.contains_key(path) {
            return false;
        }
        let below: Vec<_> = self.below(path).map(|(path, _)| path.clone()).collect();
        let nodes = Arc::make_mut(&mut self.nodes);
        for path in below {
            nodes.remove(&path);
        }
        nodes.remove(path);
        true
    }

    fn below(&self, path: &str) -> impl Iterator<Item = (&String, &Arc<[u8]>)> {
        let prefix = format!("{path}/");
        let range = (Bound::Excluded(prefix.clone()), Bound::Unbounded);
        self.nodes.range::<String, _>(range).take_while(move |(path, _)| path.starts_with(&prefix))
    }

    /// The names of a node's children.
    pub(super) fn children(&self, path: &str) -> Result<Vec<String>, StoreError> {
        if !self.nodes.contains_key(path) {
            return Err(StoreError::Missing);
        }
        let start = path.len() + 1;
        let names = self.below(path).map(|(path, _)| &path[start..]);
        Ok(names.filter(|name| !name.contains('/')).map(str::to_string).collect())
    }

    pub(super) fn dump(&self) -> String {
        let mut text = String::new();
        for (path, value) in self.nodes.iter().filter(|(_, value)| !value.is_empty()) {
            let _ = writeln!(text, "{path} = {:?}", String::from_utf8_lossy(value));
        }
        text
    }
}
