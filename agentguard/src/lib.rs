//! The user half.

pub mod grant;
pub mod identity;
pub mod manifest;
pub mod name;
pub mod pattern;
pub mod scope;
