# derpd as an image: one static binary on distroless, run as nobody in particular.
#
#   docker build -t derpd .
#
# This file uses nothing beyond the classic builder, so that old engines and
# hosted builders (which know no cache mounts) build it as BuildKit does.
#
# Where Docker Hub, gcr.io or Go's module proxy cannot be reached, in mainland
# China for example, name mirrors of your own:
#
#   docker build --build-arg GO_IMAGE=… --build-arg BASE_IMAGE=… --build-arg GOPROXY=… .
#
# or make stand-ins for both images from Debian's packages: docker/bases/make.
ARG GO_IMAGE=golang:1.27
ARG BASE_IMAGE=gcr.io/distroless/static-debian13:nonroot

# Go cross-compiles, so the compiler runs on the builder's own platform and no
# emulation is needed for other ones. BuildKit says what that platform is; for
# the classic builder "linux" is whatever it runs on.
FROM --platform=${BUILDPLATFORM:-linux} ${GO_IMAGE} AS build
WORKDIR /src

# A missing toolchain is an error here, not a silent download: it means that
# the image above fell behind go.mod. An empty GOPROXY is Go's own default.
ARG GOPROXY
ENV CGO_ENABLED=0 GOTOOLCHAIN=local GOPROXY=${GOPROXY}

# Before the sources, so that a change to them does not fetch the modules anew.
COPY go.mod go.sum ./
RUN go mod download

COPY . .

# Another release of Tailscale than go.mod's, v1.104.5 for example. It may need
# a newer GO_IMAGE, and says so.
ARG TAILSCALE_VERSION
RUN [ -z "${TAILSCALE_VERSION}" ] || go get "tailscale.com@${TAILSCALE_VERSION}" ./cmd/derpd

# TAGS adds DNS providers that are left out for their size: hetzner, route53.
ARG VERSION=dev TAGS TARGETOS TARGETARCH TARGETVARIANT
RUN GOOS="${TARGETOS}" GOARCH="${TARGETARCH}" GOARM="${TARGETVARIANT#v}" \
    go build -trimpath -tags "${TAGS}" -ldflags "-s -w -buildid= -X main.version=${VERSION}" -o /out/derpd ./cmd/derpd \
 && mkdir -p /out/data/certs /out/app && ln -s /data/certs /out/app/certs

# The base has no programs, only files that are the same on every platform, and
# it is not published for all of them: 386 is missing. So the files are copied.
FROM --platform=${BUILDPLATFORM:-linux} ${BASE_IMAGE} AS base

FROM scratch
COPY --from=base / /
# SOURCE is where these sources are published; whoever publishes the image says so.
ARG VERSION=dev SOURCE
LABEL org.opencontainers.image.title="derpd" \
      org.opencontainers.image.description="A private DERP relay for Tailscale and Headscale" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="BSD-3-Clause" \
      org.opencontainers.image.version="${VERSION}"

COPY --from=build /out/derpd /derpd

# A named volume takes its owner from this directory. WORKDIR would not do:
# builders disagree on who owns what it makes.
COPY --from=build --chown=65532:65532 /out/data /data
VOLUME /data

# Where the image fredliang/derper has its certificates: what people mount there
# is found when they change the image line.
COPY --from=build /out/app /app

USER 65532:65532
EXPOSE 443/tcp 80/tcp 3478/udp

# The first check comes one interval after the start, so the interval is also
# how long a new container takes to be called healthy. The start period is the
# time a certificate authority is given; after it, and three checks more, a bad
# update is called unhealthy. A check gives up by itself before the engine does,
# so that the engine has the cause.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["/derpd", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/derpd"]
