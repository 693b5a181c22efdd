# One target for each task of a developer. `make help` lists them.

# go.mod alone names the toolchain.
export GOTOOLCHAIN ?= go$(shell sed -n 's/^go //p' go.mod)

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
IMAGE   ?= derpd
# URL of the repository that publishes what is built; `derpd version --check` asks it.
SOURCE  ?=
ARCHES  ?= amd64 arm64 arm 386
TOOLS   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/derpd

# Each file name contains the version, so a new version here builds the tool again.
GOLANGCI_LINT := $(TOOLS)/golangci-lint-v2.15.0
GOVULNCHECK   := $(TOOLS)/govulncheck-v1.9.0
ACTIONLINT    := $(TOOLS)/actionlint-v1.7.12

# tailscaled may be older than the relay, as in real networks, but not newer.
TAILSCALE := v1.102.5
HEADSCALE := v0.29.0
PEERS     := $(TOOLS)/peers-static-tailscale-$(TAILSCALE)-headscale-$(HEADSCALE)

# Upstream's own server at the version in go.mod, which bench measures beside derpd.
UPSTREAM := $(shell sed -n 's/^\ttailscale\.com //p' go.mod)
DERPER   := $(TOOLS)/derper-$(UPSTREAM)

# A registry for the image and a reverse proxy that ends TLS. Both take minutes to
# build, and no other target builds them. Tests that need one are skipped without it.
REGISTRY_VERSION := v3.1.2
REGISTRY         := $(TOOLS)/registry-$(REGISTRY_VERSION)
CADDY_VERSION    := v2.11.9
CADDY            := $(TOOLS)/caddy-$(CADDY_VERSION)

# Names the programs without which tests were skipped. go test does not print that.
skipped = for target in registry:$(REGISTRY) caddy:$(CADDY); do \
	[ -x "$${target\#*:}" ] || echo "SKIPPED: tests that need $${target\#*:}; make $${target%%:*} builds it"; done

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

test: export DERPD_PEERS := $(PEERS)
test: export DERPD_DERPER := $(DERPER)
test: export DERPD_REGISTRY := $(REGISTRY)
test: export DERPD_CADDY := $(CADDY)
.PHONY: test
test: peers $(DERPER) ## run all tests, in any order, with the race detector
	@# Fills the build cache, which the test in internal/compat uses.
	CGO_ENABLED=0 go build -trimpath -o /dev/null ./cmd/derpd
	go test -race -shuffle=on -timeout 10m ./...
	@$(skipped)

.PHONY: peers
peers: $(addprefix $(PEERS)/,tailscaled tailscale containerboot headscale) ## build the real tailscaled and headscale that tests use

.PHONY: registry caddy
registry: $(REGISTRY) ## build the registry that tests push images to
caddy: $(CADDY) ## build the reverse proxy that tests use

# High ports and a directory here need no root. Variables of the environment win.
run map: export DERP_ADDR ?= :8443
run map: export DERP_HTTP_PORT ?= 8080
run map: export DERP_STUN_PORT ?= 3478
run map: export DERP_DATA_DIR ?= $(CURDIR)/data
.PHONY: run
run: ## run a relay here, without Docker and without configuration
	go run ./cmd/derpd

.PHONY: map
map: FORMAT ?= policy
map: ## print the map of that relay, FORMAT=policy, headscale or json
	@go run ./cmd/derpd derpmap --format $(FORMAT)

.PHONY: build
build: BINARY ?= derpd
build: ## build the binary, ./derpd
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -buildid= -X main.version=$(VERSION) -X main.source=$(SOURCE)' -o $(BINARY) ./cmd/derpd

# For machines without Docker. The image's build cross-compiles by itself.
.PHONY: cross
cross: ## build for every platform of the image, and print the sizes
	@for arch in $(ARCHES); do \
		GOOS=linux GOARCH=$$arch GOARM=7 $(MAKE) --silent --no-print-directory build BINARY=derpd-linux-$$arch || exit; \
		stat --format '%s' derpd-linux-$$arch | numfmt --to=si --suffix=B --format "derpd-linux-$$arch: %.1f"; \
	done

# Packed in dist, for people without Docker and without Go.
.PHONY: dist
dist: cross ## make a release's archives for every platform of the image, and SHA256SUMS
	@.ci/dist $(VERSION:v%=%) $(ARCHES)

.PHONY: reproducible
reproducible: ## build twice, the second time in another directory without a cache, and compare
	.ci/reproducible

# DERPD names another build to measure. BENCH holds flags, which
# `go run ./cmd/bench -h` lists. Nothing else should run on this machine.
.PHONY: bench
bench: $(if $(DERPD),,build) $(DERPER) ## measure speed and memory beside upstream's derper, in twelve minutes
	go run ./cmd/bench --derper $(DERPER) --derpd $(abspath $(or $(DERPD),derpd)) $(BENCH)

.PHONY: bench-path
bench-path: $(if $(DERPD),,build) $(DERPER) ## measure delays and rates on slow, long, lossy and shared links; as root, in a quarter of an hour
	unshare --net go run ./cmd/bench --derper $(DERPER) --derpd $(abspath $(or $(DERPD),derpd)) --path $(BENCH)

# TORTURE holds flags, which `go run ./cmd/torture -h` lists: TORTURE='--only hellos', or
# TORTURE='--soak 1h'. SHORT=1 runs the short attacks on derpd alone, in two minutes, as CI
# does. A busy machine proves little: its lines say NOT REACHED.
.PHONY: torture
torture: $(if $(DERPD),,build) $(if $(SHORT),,$(DERPER)) ## attack it and upstream's derper, and fail if a promise is broken; as root, in half an hour
	go run ./cmd/torture --derpd $(abspath $(or $(DERPD),derpd)) $(if $(SHORT),--short,--derper $(DERPER)) $(TORTURE)

.PHONY: bench-docs
bench-docs: BENCH = --json docker/bench.json --docs
bench-docs: bench ## measure as bench does, and update the tables in the READMEs

# A build argument without a value takes that of the environment, so that mirrors are
# named once; see the Dockerfile.
.PHONY: image
image: ## build the image, derpd, and print its size
	docker build --build-arg VERSION=$(VERSION) --build-arg SOURCE=$(SOURCE) --build-arg GOPROXY --build-arg GO_IMAGE --build-arg BASE_IMAGE --build-arg TAILSCALE_VERSION -t $(IMAGE) .
	@docker image inspect --format '{{.Size}}' $(IMAGE) | numfmt --to=si --suffix=B --format '$(IMAGE): %.1f'

# Where no registry can be reached, run docker/bases/make first. `make e2e RUN=pinned`
# runs one scenario.
e2e e2e-all: export DERPD_PEERS := $(PEERS)
e2e e2e-all: export DERPD_DERPER := $(DERPER)
e2e e2e-all: export DERPD_REGISTRY := $(REGISTRY)
e2e e2e-all: export DERPD_CADDY := $(CADDY)
e2e e2e-all: export DERPD_IMAGE := $(IMAGE)
E2E := go test -tags e2e -count=1 -v -timeout 45m ./docker/e2e

.PHONY: e2e
e2e: image peers $(DERPER) ## test the image with docker compose and real nodes; uses ports 443, 80 and 3478
	$(E2E) $(if $(RUN),-run 'TestScenarios/$(RUN)',-short)
	@$(skipped)

.PHONY: e2e-all
e2e-all: image peers $(DERPER) ## test as e2e does, with the scenarios that take long
	$(E2E)
	@$(skipped)

# tidy also checks modules that only the tests of dependencies need. -e ignores
# modules that cannot be fetched, but prints them. The output is shown only on failure.
.PHONY: lint
lint: $(GOLANGCI_LINT) $(ACTIONLINT) ## check the code, go.mod, the scripts and the workflows
	$(GOLANGCI_LINT) run
	@# Constants that fit only into 64 bits fail here.
	CGO_ENABLED=0 GOOS=linux GOARCH=386 go vet ./cmd/derpd/...
	go mod tidy -e -diff 2>/dev/null || go mod tidy -e -diff
	shellcheck .ci/* .github/ci .github/merge .github/publish docker/bases/make docker/derpd-update
	$(ACTIONLINT)

.PHONY: fmt
fmt: $(GOLANGCI_LINT) ## format the code
	$(GOLANGCI_LINT) fmt

.PHONY: vuln
vuln: $(GOVULNCHECK) ## check the code that is used for known vulnerabilities
	go run ./cmd/upstream --govulncheck $(GOVULNCHECK) vuln

# Releases of Tailscale and certmagic, and fixes of known vulnerabilities. Without
# govulncheck, the output says that vulnerabilities were not checked.
.PHONY: upstream
upstream: ## take newer versions of what derpd is built on
	@test -x $(GOVULNCHECK) || $(MAKE) $(GOVULNCHECK) || true
	go run ./cmd/upstream --write --govulncheck $(GOVULNCHECK)

# Works in a clone and changes nothing here.
.PHONY: upstream-test
upstream-test: FROM ?= v1.102.5
upstream-test: ## give a clone an older Tailscale, take the newest, run all tests
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	git clone --quiet . "$$dir" && cd "$$dir" && \
	go mod edit -require=tailscale.com@$(FROM) && \
	$(MAKE) upstream && $(MAKE) test

# A test fails when these differ from the configuration.
.PHONY: docs
docs: ## regenerate docker/env.example and the tables in the README
	go generate ./cmd/derpd/internal/config

$(GOLANGCI_LINT): PACKAGE = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(GOVULNCHECK): PACKAGE = golang.org/x/vuln/cmd/govulncheck
$(ACTIONLINT): PACKAGE = github.com/rhysd/actionlint/cmd/actionlint
$(GOLANGCI_LINT) $(GOVULNCHECK) $(ACTIONLINT):
	GOBIN=$(@D)/bin go install -trimpath $(PACKAGE)@v$(lastword $(subst -v, ,$@))
	mv $(@D)/bin/$(notdir $(PACKAGE)) $@

# Static, so that an image can contain them, and with the version as in a release. The
# detection of captive portals is left out, because it contacts hosts on the internet.
$(PEERS)/tailscaled $(PEERS)/tailscale $(PEERS)/containerboot:
	CGO_ENABLED=0 GOBIN=$(TOOLS)/bin go install -trimpath -tags ts_omit_captiveportal \
		-ldflags '-X tailscale.com/version.longStamp=$(TAILSCALE:v%=%) -X tailscale.com/version.shortStamp=$(TAILSCALE:v%=%)' \
		tailscale.com/cmd/$(@F)@$(TAILSCALE)
	mkdir -p $(@D)
	mv $(TOOLS)/bin/$(@F) $@

# Builds a program as a requirement of an empty module, in which the modules that it
# needs can be replaced. go install would also need a list of the module's versions,
# which not every proxy has.
# $(call program,MODULE@VERSION,PACKAGE,FLAGS OF GO MOD EDIT)
define program
	rm -rf $@.module
	mkdir -p $@.module
	cd $@.module && go mod init tool && go mod edit -require=$(1) $(3) && \
		CGO_ENABLED=0 go build -mod=mod -trimpath -ldflags '-s -w' -o program $(2)
	mv $@.module/program $@
	rm -r $@.module
endef

$(PEERS)/headscale:
	$(call program,github.com/juanfont/headscale@$(HEADSCALE),github.com/juanfont/headscale/cmd/headscale)

# setec's version in Tailscale's go.mod is not published.
$(DERPER):
	$(call program,tailscale.com@$(UPSTREAM),tailscale.com/cmd/derper,-replace=github.com/tailscale/setec=github.com/tailscale/setec@v0.0.0-20260310221408-dcd97e42f251)

$(REGISTRY):
	$(call program,github.com/distribution/distribution/v3@$(REGISTRY_VERSION),github.com/distribution/distribution/v3/cmd/registry)

$(CADDY):
	$(call program,github.com/caddyserver/caddy/v2@$(CADDY_VERSION),github.com/caddyserver/caddy/v2/cmd/caddy)
