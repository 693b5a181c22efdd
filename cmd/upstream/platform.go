package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	// maxConfig is the limit of an image's configuration, in bytes. derpd's has 4 kB.
	maxConfig = 1 << 20
	// versionLabel is the label with the name of the release.
	versionLabel = "org.opencontainers.image.version"
)

// firstRelease is earlier than every release. Tools that make builds reproducible set
// 1970 or 1980 as the time of creation, but updaters show and compare that time.
var firstRelease = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// platform checks the image for one platform. It returns the image's release, which
// every platform must have: release is that of the first platform, or empty. An error
// means that the image could not be read.
func (v *verifier) platform(ctx context.Context, platform string, img v1.Image, release string) (string, error) {
	manifest, err := img.Manifest()
	if err != nil {
		return release, err
	}
	// A negative size would be read without a limit.
	if size := manifest.Config.Size; size < 0 || size > maxConfig {
		return release, fmt.Errorf("the configuration has %d bytes; at most %d are read", size, maxConfig)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return release, err
	}
	labels := config.Config.Labels
	problem := sameRelease(labels[versionLabel], release)
	v.say(platform, "version", problem, "%s", labels[versionLabel])
	if problem == nil {
		release = labels[versionLabel]
	}
	for _, check := range []struct{ name, got, want string }{
		{"platform", nameOf(config.Platform()), platform},
		{"title", labels["org.opencontainers.image.title"], "derpd"},
		{"description", labels["org.opencontainers.image.description"], "A private DERP relay for Tailscale and Headscale"},
		{"licenses", labels["org.opencontainers.image.licenses"], "BSD-3-Clause"},
		{"user", config.Config.User, "65532:65532"},
		{"entry point", fmt.Sprintf("%q", config.Config.Entrypoint), `["/derpd"]`},
		{"command", fmt.Sprintf("%q", config.Config.Cmd), "[]"},
		{"health check", health(config.Config.Healthcheck), `["CMD" "/derpd" "healthcheck"] interval 10s, timeout 6s, retries 3, start period 30s`},
		{"ports", keys(config.Config.ExposedPorts), "3478/udp 443/tcp 80/tcp"},
		{"volumes", keys(config.Config.Volumes), "/data"},
		{"stop signal", config.Config.StopSignal, "SIGTERM"},
	} {
		var problem error
		if check.got != check.want {
			problem = fmt.Errorf("%q; want %q", check.got, check.want)
		}
		v.say(platform, check.name, problem, "%s", check.got)
	}
	v.say(platform, "source", sourceURL(labels["org.opencontainers.image.source"]), "%s", labels["org.opencontainers.image.source"])
	_, err = v1.NewHash(labels[baseDigest])
	v.say(platform, "base image", err, "%s", labels[baseDigest])
	v.say(platform, "created", realTime(config.Created.Time, time.Now()), "%s", config.Created.Format(time.RFC3339))
	return release, v.contents(ctx, platform, img, manifest, config, release)
}

// nameOf returns a platform as an index names it. A configuration without one is
// possible.
func nameOf(p *v1.Platform) string {
	if p == nil {
		return ""
	}
	return p.String()
}

func keys(set map[string]struct{}) string {
	return strings.Join(slices.Sorted(maps.Keys(set)), " ")
}

// health describes a health check. Zero durations are the engine's defaults.
func health(check *v1.HealthConfig) string {
	if check == nil {
		return ""
	}
	return fmt.Sprintf("%q interval %v, timeout %v, retries %d, start period %v", check.Test, check.Interval, check.Timeout, check.Retries, check.StartPeriod)
}

// sameRelease returns an error unless the label names a release: that of the platforms
// before, if there is one.
func sameRelease(label, release string) error {
	switch {
	case !releaseName.MatchString(label):
		return fmt.Errorf("%q is not the name of a release; build with VERSION=1.104.5-1, for example", label)
	case release != "" && label != release:
		return fmt.Errorf("%s; other platforms have %s", label, release)
	}
	return nil
}

func sourceURL(source string) error {
	if at, err := url.Parse(source); err != nil || at.Scheme != "https" || at.Host == "" {
		return fmt.Errorf("%q is not the URL of the sources; build with SOURCE=https://…", source)
	}
	return nil
}

// realTime returns an error unless an image was created between the first release and
// now, with an hour for clocks that differ.
func realTime(created, now time.Time) error {
	if created.Before(firstRelease) {
		return fmt.Errorf("%s is not the time of the build; unset SOURCE_DATE_EPOCH", created.Format(time.RFC3339))
	}
	if created.After(now.Add(time.Hour)) {
		return errors.New(created.Format(time.RFC3339) + " is in the future")
	}
	return nil
}
