//! The harness of the kernel tests.
