# The image of derpd: one static binary on distroless, run as an unprivileged user.
#
#   docker build -t derpd .
#
# This file uses only features of the classic builder. Old engines and hosted
# builders, which have no cache mounts, build the same image as BuildKit.
#
# Where Docker Hub, gcr.io or Go's module proxy cannot be reached, for example in
# mainland China, set your own mirrors:
#
#   docker build --build-arg GO_IMAGE=… --build-arg BASE_IMAGE=… --build-arg GOPROXY=… .
#
# or build stand-ins for both images from Debian's packages: docker/bases/make.
ARG GO_IMAGE=golang:1.27
ARG BASE_IMAGE=gcr.io/distroless/static-debian13:nonroot

# Go cross-compiles, so the compiler runs on the builder's own platform and other
# platforms need no emulation. BuildKit sets BUILDPLATFORM. The classic builder
# takes "linux" for its own platform.
FROM --platform=${BUILDPLATFORM:-linux} ${GO_IMAGE} AS build
WORKDIR /src

# GOTOOLCHAIN=local makes an image that is older than go.mod an error, not a silent
# download. An empty GOPROXY is Go's own default.
ARG GOPROXY
ENV CGO_ENABLED=0 GOTOOLCHAIN=local GOPROXY=${GOPROXY}

# Before the sources, so that a change of the sources does not fetch modules again.
# go.mod also lists modules that only tests import. The build below fails if one that
# is compiled is missing.
COPY go.mod go.sum ./
RUN go mod download || echo "not all modules were fetched; derpd may not need the others"

COPY . .

# Another release of Tailscale than go.mod's, v1.104.5 for example. It may need a newer
# GO_IMAGE, and says so. The build then fetches only what derpd compiles.
ARG TAILSCALE_VERSION
RUN [ -z "${TAILSCALE_VERSION}" ] || go mod edit "-require=tailscale.com@${TAILSCALE_VERSION}"

# TAGS adds DNS providers that are left out for their size: hetzner, route53.
# SOURCE is the URL of the repository that publishes the image. `derpd version --check`
# asks it for its latest release.
ARG VERSION=dev SOURCE TAGS TARGETOS TARGETARCH TARGETVARIANT
RUN GOOS="${TARGETOS}" GOARCH="${TARGETARCH}" GOARM="${TARGETVARIANT#v}" \
    go build ${TAILSCALE_VERSION:+-mod=mod} -trimpath -tags "${TAGS}" -ldflags "-s -w -buildid= -X main.version=${VERSION} -X main.source=${SOURCE}" -o /out/derpd ./cmd/derpd \
 && mkdir -p /out/data/certs /out/app && ln -s /data/certs /out/app/certs

# The base has no image for 386. Its files are the same on every platform, because
# none is a program, so they are copied from the builder's platform.
FROM --platform=${BUILDPLATFORM:-linux} ${BASE_IMAGE} AS base

FROM scratch
COPY --from=base / /
ARG VERSION=dev SOURCE
LABEL org.opencontainers.image.title="derpd" \
      org.opencontainers.image.description="A private DERP relay for Tailscale and Headscale" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="BSD-3-Clause" \
      org.opencontainers.image.version="${VERSION}"

COPY --from=build /out/derpd /derpd

# A named volume takes its owner from this directory. WORKDIR cannot make it:
# builders disagree on the owner.
COPY --from=build --chown=65532:65532 /out/data /data
VOLUME /data

# /app/certs is the certificate directory of the image fredliang/derper. Its users
# can change the image line and keep their mounts.
COPY --from=build /out/app /app

USER 65532:65532
EXPOSE 443/tcp 80/tcp 3478/udp

# The first check runs one interval after the start, so a new container becomes
# healthy only then. The start period leaves a certificate authority time. After it,
# three failed checks make a bad update unhealthy. A check ends before the engine's
# timeout, so that the engine gets the cause.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["/derpd", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/derpd"]
