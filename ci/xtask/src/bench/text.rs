//! How much code an image has of a driver.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// The crates that are the driver.
const DRIVER: [&str; 3] = ["pvblk", "pvblk_xen", "xen_blkfront"];

/// Bytes of machine code, in functions of the driver's crates and in functions of the standard
/// library that are made for its types. What is inlined into a function counts as that function's.
pub fn of_driver(image: &Path) -> Result<u64> {
    let symbols = Symbols::read(image)?;
    Ok(symbols
        .functions
        .iter()
        .filter(|function| is_driver(&function.name))
        .map(|function| function.bytes)
        .sum())
}

/// Bytes of machine code in an object file: a kernel's module.
pub fn of_object(content: &[u8]) -> Result<u64> {
    let file = object::File::parse(content).context("this is not an object file")?;
    Ok(file
        .sections()
        .filter(|section| section.kind() == object::SectionKind::Text)
        .map(|section| section.size())
        .sum())
}

/// One function of an image.
pub struct Function {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u64,
    /// Its path.
    pub name: String,
}

/// An image's functions, by address.
pub struct Symbols {
    functions: Vec<Function>,
}

impl Symbols {
    /// Reads the table of symbols.
    pub fn read(image: &Path) -> Result<Self> {
        let content = fs::read(image)?;
        let file = object::File::parse(&*content)
            .with_context(|| format!("{} is not an object file", image.display()))?;
        let mut functions: Vec<Function> = file
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
            .map(|symbol| Function {
                address: symbol.address(),
                bytes: symbol.size(),
                name: format!("{:#}", rustc_demangle::demangle(symbol.name().unwrap_or(""))),
            })
            .collect();
        functions.sort_by_key(|function| function.address);
        // Two names for the same code.
        functions.dedup_by_key(|function| function.address);
        Ok(Self { functions })
    }

    /// The function that holds an address.
    pub fn at(&self, address: u64) -> Option<&Function> {
        let after = self.functions.partition_point(|function| function.address <= address);
        let function = self.functions.get(after.checked_sub(1)?)?;
        (address < function.address + function.bytes).then_some(function)
    }
}

/// Whether a function, by its demangled path, is the driver's.
fn is_driver(path: &str) -> bool {
    let mut crates = crates(path);
    match crates.next() {
        Some("core" | "alloc") => crates.any(|name| DRIVER.contains(&name)),
        Some(first) => DRIVER.contains(&first),
        None => false,
    }
}

/// The first parts of all the paths in a path: `<a::B as c::D<e::F>>::g` has `a`, `c` and `e`.
fn crates(path: &str) -> impl Iterator<Item = &str> {
    let word = |byte: char| byte.is_alphanumeric() || byte == '_';
    path.match_indices("::").filter_map(move |(at, _)| {
        let start = path[..at].rfind(|byte| !word(byte)).map_or(0, |before| before + 1);
        (start < at && !path[..start].ends_with("::")).then(|| &path[start..at])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_function_is_found() {
        assert!(is_driver("xen_blkfront::disk::Disk<T>::connect"));
        assert!(is_driver("<pvblk_xen::wire::Ring<T> as pvblk::frontend::Wire>::take"));
        assert!(is_driver("core::ptr::drop_in_place<pvblk::buffer::Pool<xen_guest::Guest>>"));
        assert!(!is_driver("core::ptr::drop_in_place<xen_guest::Guest>"));
        assert!(!is_driver("unikernel::bench::drive::<xen_blkfront::Disk>"));
        assert!(!is_driver("<xen_guest::Guest as pvblk_xen::platform::Clock>::now"));
        assert!(!is_driver("memcpy"));
    }
}
