# One-line recipes; CI calls the same lines. `just` lists them.

all := "--workspace --features dsmoe-bench/cuda,dsmoe-bench/hub --locked"

default:
    @just --list

# Everything that CI checks before a merge.
check:
    .ci/run

fmt:
    cargo fmt --all

lint:
    cargo clippy {{all}} --all-targets -- -D warnings

# The API of all crates; target/doc/dsmoe_bench/index.html leads to them.
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc {{all}} --no-deps

# All tests, without extra tools.
test:
    cargo test --workspace --locked

# All tests by nextest; the command's share fixtures and take longer this way.
nextest *ARGS:
    cargo nextest run {{all}} {{ARGS}}

# Models and routers on another instruction-set tier: scalar, avx2, avx512, neon.
test-on ISA:
    DSMOE_ISA={{ISA}} cargo test --locked -p dsmoe-kernels -p dsmoe-router -p dsmoe-core

# The shared-mutable sink of the kernels under Miri (nightly).
miri:
    cargo +nightly miri test -p dsmoe-kernels --lib buf::

# Another platform: aarch64-unknown-linux-gnu, x86_64-apple-darwin, aarch64-apple-darwin or x86_64-pc-windows-msvc.
check-on TARGET:
    cargo check --workspace --locked --target {{TARGET}}

# Tests for aarch64 under qemu-user.
aarch64 *ARGS:
    scripts/check-aarch64 {{ARGS}}

# Licences, advisories, sources and duplicates of dependencies (cargo-deny).
deny:
    cargo deny --workspace check

# What would be published, built from the packages alone.
package:
    cargo publish --workspace --dry-run --locked

# The wheel of the Python package, and its tests.
python:
    cargo build --locked && scripts/check-python --dsmoe target/debug/dsmoe

# A fuzz target for a minute (nightly, cargo-fuzz); `cargo fuzz list` has the names.
fuzz TARGET SECONDS="60":
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}}

# The paper's comparison on the embedded world.
reproduce *ARGS:
    cargo run --release --locked -- reproduce {{ARGS}}
