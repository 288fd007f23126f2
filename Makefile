# SPDX-License-Identifier: GPL-2.0-or-later
#
# The few commands that people type; "make help" names them.  The work is in
# scripts/.  Every target may run at the same time as any other: they take
# turns at a lock.

SHELL := /bin/bash
export PATH := /usr/sbin:/usr/bin:/sbin:/bin:$(PATH)

# QEMU's build cannot cope with either, nor can this file: "make clean" would
# remove what is beside.
ifneq ($(words [$(subst :, ,$(CURDIR))]),1)
  $(error $(CURDIR): move it to a path without blanks and colons)
endif

top := $(CURDIR)
B := $(top)/build
prefix ?= /usr/local
FULL ?=
SUITE ?=
SANITIZE ?=
LONG ?=
# Debian's: 6.1, 6.12, the newest.
KERNELS ?= bookworm trixie trixie-backports
TESTS ?=
MINUTES ?=
SEED ?=
QEMU_SRC ?=
QEMU_VERSION ?= 10.0
ifneq ($(QEMU_SRC),)
  override QEMU_VERSION := $(shell cat $(QEMU_SRC)/VERSION 2>/dev/null)
endif

# Every version has its own directory; the usual one is build/ itself.
version := $(shell echo $(QEMU_VERSION) | cut -d. -f1,2)
usual := 10.0
export QEMU_SRC QEMU_VERSION
export QEMU_DIR := $(B)$(if $(filter-out $(usual),$(version)),/$(version))
others := $(filter-out $(usual),$(patsubst patches/series-%,%,\
    $(wildcard patches/series-*)))
JOBS ?= $(shell nproc)

# The standalone build of the engine, one directory per kind of sanitizer.
engine := $(B)/engine$(if $(SANITIZE),-$(SANITIZE))
sanitizer_address := address,undefined
sanitizer_thread := thread
ifneq ($(SANITIZE),)
  ifeq ($(sanitizer_$(SANITIZE)),)
    $(error SANITIZE is "address" or "thread")
  endif
  engine_options := -Db_sanitize=$(sanitizer_$(SANITIZE)) -Db_lundef=false
endif

lock = mkdir -p $(B) && \
    { flock -n $(B)/.lock true || echo 'waiting for another make'; } && \
    flock $(B)/.lock

build = $(lock) env FULL=$(FULL) PREFIX=$(prefix) JOBS=$(JOBS)

.PHONY: all deps tree qemu engine demo check check-engine check-model \
        check-versions check-kernels check-qemu fuzz fuzzers bench \
        soak install uninstall deb debian-series clean help
all: qemu

help:
	@echo 'make                build QEMU with dedup: build/bin/qemu-system-x86_64'
	@echo '                    (QEMU_SRC=DIR: from your own source of QEMU)'
	@echo '                    QEMU_VERSION=10.2 with it, or with demo, check, bench,'
	@echo '                    install: that version, build/10.2/bin/qemu-system-x86_64'
	@echo 'make FULL=1         with all that Debian has in its own: build/full/bin'
	@echo 'make demo           four guests share their memory, with a live table'
	@echo 'make check          all tests'
	@echo 'make check-engine   the engine alone, in a minute; LONG=1: all of its tests,'
	@echo '                    as SANITIZE=address or SANITIZE=thread runs them'
	@echo 'make check-model    models of the window, and of segments, in all states: SPIN'
	@echo 'make check-versions builds every other version of QEMU, runs what tests it'
	@echo '                    without a guest'
	@echo 'make check-kernels  the engine, and guests of guests, under other kernels: KERNELS,'
	@echo '                    suites of Debian; hours, as nothing there is run by KVM'
	@echo 'make fuzz           the fuzzers, each for SECONDS=60 of CPU time; wants clang'
	@echo 'make soak           guests at work, and all that may happen to them, at random:'
	@echo '                    MINUTES=n (60), SEED=n to do the same again'
	@echo 'make check-qemu     runs what tests QEMU has of its own: as it came, with'
	@echo '                    dedup, with a scanner in every VM. NAMES="qmp hmp"'
	@echo 'make bench          measured beside KSM: the engine, and guests if QEMU is built'
	@echo 'make install        prefix=DIR (/usr/local), DESTDIR=DIR; FULL=1'
	@echo 'make uninstall      takes all of that away again'
	@echo 'make deb            a package, to be installed beside Debian'"'"'s own: build/deb'
	@echo '                    SUITE=trixie: for that release: build/suites/trixie/deb'
	@echo 'make debian-series  Debian'"'"'s own source package with dedup: build/debian-series'
	@echo 'make clean          remove what was built; keeps what was downloaded'
	@echo 'As root, missing Debian packages are installed first.'

deps:
	@env FULL=$(FULL) scripts/install-deps

tree: deps
	@$(lock) scripts/build-qemu --tree-only

qemu: deps
	@$(build) scripts/build-qemu

engine: deps
	@$(lock) sh -ec 'test -f $(engine)/build.ninja || \
	    meson setup $(engine_options) $(engine) $(top) > $(engine)-setup.log || \
	    { cat $(engine)-setup.log; exit 1; }; \
	    ninja -j$(JOBS) -C $(engine) $(if $(V),,--quiet)'

check-engine: engine
	@scripts/run-tests --engine $(engine) $(if $(SANITIZE)$(LONG),--long)

# The engine once more, instrumented for libFuzzer; without clang nothing.
fuzzers: deps
	@if command -v clang > /dev/null; then \
	    $(lock) sh -ec 'test -f $(B)/engine-fuzz/build.ninja || \
	        CC="ccache clang" meson setup -Db_sanitize=address,undefined \
	            -Db_lundef=false -Dc_args=-fsanitize=fuzzer-no-link \
	            $(B)/engine-fuzz $(top) > $(B)/engine-fuzz-setup.log || \
	        { cat $(B)/engine-fuzz-setup.log; exit 1; }; \
	        ninja -j$(JOBS) -C $(B)/engine-fuzz --quiet fuzzers'; \
	fi

SECONDS ?= 60
fuzz: fuzzers
	@scripts/build-relay-fuzzer
	@scripts/fuzz --seconds $(SECONDS)

check: engine fuzzers
	@$(build) FULL= scripts/build-qemu --with-tests
	@scripts/link-mutants
	@scripts/build-relay-fuzzer
	@scripts/run-tests

check-model:
	@env MODEL=1 scripts/install-deps
	@tests/model/check_models.py

check-qemu: deps
	@$(lock) env FULL= PLAIN=1 PREFIX=$(prefix) JOBS=$(JOBS) scripts/build-qemu
	@$(build) FULL= scripts/build-qemu --with-tests
	@scripts/compare-qemu $(NAMES)

check-versions: $(others:%=check-version-%)

check-version-%: engine fuzzers
	@$(lock) env FULL= QEMU_SRC= QEMU_VERSION=$* QEMU_DIR=$(B)/$* PREFIX=$(prefix) \
	    JOBS=$(JOBS) scripts/build-qemu --with-tests
	@QEMU_DIR=$(B)/$* scripts/run-tests check/ unit/test- qtest/

check-kernels: engine
	@$(build) FULL= QEMU_SRC= QEMU_VERSION=$(usual) QEMU_DIR=$(B) scripts/build-qemu
	@tests/kernels/build-kernels $(KERNELS)
	@scripts/run-tests --kernels "$(KERNELS)" \
	    $(if $(LONG),--long) $(TESTS)

demo: qemu
	@scripts/demo

bench: engine
	@scripts/bench

soak: qemu
	@env MINUTES=$(MINUTES) SEED=$(SEED) tests/guest/soak.py

install: deps
	@$(build) DESTDIR=$(abspath $(DESTDIR)) scripts/build-qemu --install

uninstall:
	@scripts/install-files --remove "$(abspath $(DESTDIR))" $(prefix)

deb:
ifneq ($(SUITE),)
	@scripts/in-suite $(SUITE) make deb SUITE= JOBS=$(JOBS)
else
	@env FULL=1 DEB=1 scripts/install-deps
	@$(build) scripts/build-deb
endif

debian-series:
	@$(lock) scripts/debian-series

clean:
	rm -rf $(B)/qemu-obj $(B)/qemu-src $(B)/bin $(B)/mutants $(B)/engine* \
	    $(B)/full $(B)/fuzz $(B)/deb $(B)/suites $(B)/debian-series \
	    $(B)/test-logs $(B)/kernels $(others:%=$(B)/%)
