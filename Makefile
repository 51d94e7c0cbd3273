# The two commands are `make demo` and `make test`; both install what they need on a bare Debian machine with Rust, as root.

SHELL := /bin/bash
PROGRAMS := $(or $(CARGO_TARGET_DIR),target)/debug
PACKAGES := $(abspath $(or $(CARGO_TARGET_DIR),target)/packages)
RELEASE := $(abspath $(or $(CARGO_TARGET_DIR),target)/release)

# Where `make install` puts things: DESTDIR goes before all of it, for packagers.
PREFIX := /usr/local
INSTALLED := cloison cloison-agent cloison-coordinator
UNITS := cloison-agent.service cloison-agent-prepare.service cloison-coordinator.service
BINDIR = $(DESTDIR)$(PREFIX)/bin
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system
USERDIR = $(DESTDIR)$(PREFIX)/lib/sysusers.d
DOCDIR = $(DESTDIR)$(PREFIX)/share/doc
BASHDIR = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSHDIR = $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISHDIR = $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d

.PHONY: help build release install uninstall deb rpm demo bench test check lint doc openapi clean-lab setup setup-machines

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## install what the lab runs besides Rust
	@tests/scripts/setup.sh

setup-machines: setup ## make the root of the machines that tests boot, and install the tools that make packages
	@tests/scripts/setup-machines.sh

build: ## build the programs, and those of the lab
	cargo build --workspace

release: ## build the programs to install
	cargo build --release --locked -p cloison-agent -p cloison-coordinator -p cloison-cli

$(addprefix $(RELEASE)/,$(INSTALLED)):
	$(MAKE) release

install: $(addprefix $(RELEASE)/,$(INSTALLED)) ## install programs, units, completions and documentation below DESTDIR and PREFIX (/usr/local)
	install -d $(BINDIR) $(UNITDIR) $(USERDIR) $(BASHDIR) $(ZSHDIR) $(FISHDIR) $(addprefix $(DOCDIR)/,$(INSTALLED))
	install -m 755 $(addprefix $(RELEASE)/,$(INSTALLED)) $(BINDIR)
	for unit in $(UNITS); do sed 's|/usr/bin/|$(PREFIX)/bin/|; s|/usr/share/|$(PREFIX)/share/|g' systemd/$$unit >$(UNITDIR)/$$unit; done
	chmod 644 $(addprefix $(UNITDIR)/,$(UNITS))
	set -e; for program in $(INSTALLED); do \
	  $(RELEASE)/$$program completions bash >$(BASHDIR)/$$program; \
	  $(RELEASE)/$$program completions zsh >$(ZSHDIR)/_$$program; \
	  $(RELEASE)/$$program completions fish >$(FISHDIR)/$$program.fish; \
	done
	chmod 644 $(addprefix $(BASHDIR)/,$(INSTALLED)) $(addprefix $(ZSHDIR)/_,$(INSTALLED)) $(patsubst %,$(FISHDIR)/%.fish,$(INSTALLED))
	install -m 644 systemd/sysusers.d/cloison-coordinator.conf $(USERDIR)
	install -m 644 README.md CHANGELOG.md docs/*.md $(DOCDIR)/cloison
	for program in $(INSTALLED); do install -m 644 LICENSE-APACHE LICENSE-MIT $(DOCDIR)/$$program; done
	install -m 644 systemd/README.md $(DOCDIR)/cloison-agent/systemd.md
	install -m 644 systemd/README.md $(DOCDIR)/cloison-coordinator/systemd.md
	install -m 644 systemd/cloison-agent.service.d/attachments.conf $(DOCDIR)/cloison-agent

uninstall: ## remove what `make install` put there; state and the user `cloison` stay (docs/install.md says how to remove them)
	rm -f $(addprefix $(BINDIR)/,$(INSTALLED)) $(addprefix $(UNITDIR)/,$(UNITS)) $(USERDIR)/cloison-coordinator.conf
	rm -f $(addprefix $(BASHDIR)/,$(INSTALLED)) $(addprefix $(ZSHDIR)/_,$(INSTALLED)) $(patsubst %,$(FISHDIR)/%.fish,$(INSTALLED))
	rm -rf $(addprefix $(DOCDIR)/,$(INSTALLED))

deb: release ## make the Debian packages, in PACKAGES (target/packages)
	systemd/package.sh deb release $(PACKAGES)

rpm: release ## make the RPM packages, in PACKAGES
	systemd/package.sh rpm release $(PACKAGES)

demo: setup build ## show the mesh on one machine, with a real PostgreSQL; KEEP=1 leaves it running
	@$(PROGRAMS)/cloison-demo

bench: setup ## measure the release programs, beside wireguard-go; BENCH=-ojson and the like
	cargo build --release -p cloison-agent -p cloison-coordinator -p cloison-cli
	cargo build -p cloison-tests --bin cloison-bench
	@CLOISON_PROGRAMS=$(RELEASE) $(PROGRAMS)/cloison-bench $(BENCH)

test: setup setup-machines lint doc ## run everything
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
