//! Messages to `log` or to `defmt`, or to nobody.
//!
//! Values go through `Display`, which both can do: `defmt` through its `Display2Format`.

#[cfg(all(feature = "log", feature = "defmt"))]
compile_error!("choose one of the features `log` and `defmt` of virtio-blk-driver, not both");

macro_rules! message {
    ($level:ident, $text:literal $(, $value:expr)* $(,)?) => {{
        #[cfg(feature = "log")]
        ::log::$level!($text $(, $value)*);
        #[cfg(all(feature = "defmt", not(feature = "log")))]
        ::defmt::$level!($text $(, ::defmt::Display2Format(&$value))*);
        #[cfg(not(any(feature = "log", feature = "defmt")))]
        {
            $(let _ = &$value;)*
        }
    }};
}

pub(crate) use message;
