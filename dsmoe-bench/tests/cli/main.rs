//! The built command, run as a user runs it.

mod bad_input;
mod bench;
mod benchmarks;
mod chat;
mod commands;
mod common;
mod continual;
mod data;
mod export;
mod families;
mod faults;
mod golden;
mod hub;
mod mixtures;
mod plan;
mod processes;
mod prune;
mod related;
mod reproduce;
mod snapshots;
mod surgery;
mod sweep;
mod track;
mod trust;
mod variants;
mod world;
