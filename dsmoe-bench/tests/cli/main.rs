//! The built command, run as a user runs it.

mod bad_input;
mod commands;
mod common;
mod faults;
