//! The user half.
