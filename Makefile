# The two commands are `make demo` and `make test`; both install what they need on a bare Debian machine with Rust, as root.

SHELL := /bin/bash
PROGRAMS := $(or $(CARGO_TARGET_DIR),target)/debug
RELEASE := $(abspath $(or $(CARGO_TARGET_DIR),target)/release)

.PHONY: help build demo bench test check lint doc openapi clean-lab setup

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install what the lab runs besides Rust
	@tests/scripts/setup.sh

build: ## build the programs, and those of the lab
	cargo build --workspace

demo: setup build ## show the mesh on one machine, with a real PostgreSQL; KEEP=1 leaves it running
	@$(PROGRAMS)/cloison-demo

bench: setup ## measure the release programs, beside wireguard-go; BENCH=-ojson and the like
	cargo build --release -p cloison-agent -p cloison-coordinator -p cloison-cli
	cargo build -p cloison-tests --bin cloison-bench
	@CLOISON_PROGRAMS=$(RELEASE) $(PROGRAMS)/cloison-bench $(BENCH)

test: setup lint doc ## run everything
	tests/scripts/run-tests.sh

check: lint ## what can be said without root: format, lints, unit and property tests
	cargo test --workspace --exclude cloison-tests

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --quiet

openapi: ## write the OpenAPI document anew from the handlers
	CLOISON_WRITE_OPENAPI=1 cargo test -p cloison-coordinator --test api the_committed_openapi_document

clean-lab: ## remove what a killed or kept lab or demo left behind
	@$(PROGRAMS)/lab-tool clean
