//! Messages to `log`, or to nobody.

macro_rules! message {
    ($level:ident, $text:literal $(, $value:expr)* $(,)?) => {{
        #[cfg(feature = "log")]
        ::log::$level!($text $(, $value)*);
        #[cfg(not(feature = "log"))]
        {
            $(let _ = &$value;)*
        }
    }};
}

pub(crate) use message;
