//! Structs of settings whose defaults stand beside their fields.

/// Declares a struct of public fields, each with its default, and its [`Default`].
///
/// ```
/// dsmoe_core::with_defaults! {
///     /// Settings.
///     #[derive(Debug)]
///     pub struct Settings {
///         /// The width.
///         pub width: usize = 8,
///     }
/// }
/// assert_eq!(Settings::default().width, 8);
/// ```
#[macro_export]
macro_rules! with_defaults {
    ($(#[$attribute:meta])* $vis:vis struct $name:ident {
        $($(#[$field_attribute:meta])* pub $field:ident: $type:ty = $default:expr,)*
    }) => {
        $(#[$attribute])*
        $vis struct $name { $($(#[$field_attribute])* pub $field: $type,)* }

        impl Default for $name {
            fn default() -> $name {
                $name { $($field: $default,)* }
            }
        }
    };
}
