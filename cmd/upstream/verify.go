package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// published are the platforms of a release, as the release workflow and the README
// name them.
var published = []string{"linux/386", "linux/amd64", "linux/arm/v7", "linux/arm64"}

// verifier checks published images by the registry's API, and says so if they cannot be
// read without a login.
type verifier struct {
	images  images
	timeout time.Duration // limit of everything about one image
	static  bool          // not to run the image's program
	stdout  io.Writer

	checks, failed int // lines that were printed
	// releases has the release in each image that was checked, by repository and
	// digest, so that an image with several tags is read once.
	releases map[string]string
}

// line is the format of a line: verdict, platform, check and text.
const line = "%-6s%-14s%-15s%s\n"

// say prints the outcome of one check. The text is printed if there is no problem.
func (v *verifier) say(platform, check string, problem error, format string, args ...any) {
	verdict, text := "ok", fmt.Sprintf(format, args...)
	v.checks++
	if problem != nil {
		v.failed++
		// Answers of registries may have several lines.
		verdict, text = "fail", strings.Join(strings.Fields(problem.Error()), " ")
	}
	_, _ = fmt.Fprintf(v.stdout, line, verdict, platform, check, text)
}

// verify checks images and prints a line for each check. It checks everything before
// it returns an error.
func (v *verifier) verify(ctx context.Context, images []string) error {
	v.releases = make(map[string]string)
	for _, image := range images {
		if err := v.image(ctx, image); err != nil {
			return err
		}
	}
	if v.failed > 0 {
		return fmt.Errorf("%d of %d checks failed; do not announce this release", v.failed, v.checks)
	}
	_, err := fmt.Fprintf(v.stdout, "%d checks passed\n", v.checks)
	return err
}

// image checks one image. The error is that of the command line or of ctx; faults of
// the image are printed.
func (v *verifier) image(ctx context.Context, image string) error {
	ref, err := v.images.reference(image)
	if err != nil {
		return usageError{err}
	}
	limited, cancel := context.WithTimeout(ctx, v.timeout)
	defer cancel()
	_, _ = fmt.Fprintln(v.stdout, image)
	found, err := remote.Get(ref, options(limited)...)
	if err != nil {
		v.say("all", "read", v.explained(registryError(err)), "")
		return ctx.Err()
	}
	// A private registry may be what the publisher wants.
	if _, err := remote.Head(ref, remote.WithContext(limited)); err != nil {
		_, _ = fmt.Fprintf(v.stdout, line, "note", "all", "public", "not readable without a login; people can pull it when you make it public")
	}
	key := ref.Context().Name() + "@" + found.Digest.String()
	release, read := v.releases[key]
	if read {
		v.say("all", "index", nil, "%s, checked above", found.Digest)
	} else {
		release = v.index(limited, found)
		v.releases[key] = release
	}
	if tag, ok := ref.(name.Tag); ok && release != "" {
		tags, err := tagsOf(release)
		if err == nil && !slices.Contains(tags, tag.TagStr()) {
			err = fmt.Errorf("%s names release %s; want one of %s", tag.TagStr(), release, strings.Join(tags, ", "))
		}
		v.say("all", "tag", err, "%s is release %s", tag.TagStr(), release)
	}
	return ctx.Err()
}

// explained adds the limit to the error of a registry that does not answer.
func (v *verifier) explained(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v; try again later, or set --timeout (%w)", v.timeout, err)
	}
	return err
}

// index checks the image for all platforms, and returns the name of its release.
func (v *verifier) index(ctx context.Context, found *remote.Descriptor) (release string) {
	if !found.MediaType.IsIndex() {
		v.say("all", "index", fmt.Errorf("one manifest for one platform (%s); want an index for %s", found.MediaType, strings.Join(published, ", ")), "")
		return ""
	}
	index, err := found.ImageIndex()
	if err != nil {
		v.say("all", "index", v.explained(err), "")
		return ""
	}
	list, err := index.IndexManifest()
	if err != nil {
		v.say("all", "index", v.explained(err), "")
		return ""
	}
	platforms, attestations, err := platformsOf(list)
	v.say("all", "index", err, "%s: %s; %d attestations", found.Digest, strings.Join(published, ", "), attestations)
	for _, platform := range slices.Sorted(maps.Keys(platforms)) {
		img, err := index.Image(platforms[platform])
		if err == nil {
			release, err = v.platform(ctx, platform, img, release)
		}
		if err != nil {
			v.say(platform, "read", v.explained(registryError(err)), "")
		}
	}
	return release
}

// platformsOf returns the published platforms in an index. Entries for attestations
// (bills of materials, provenance) have the platform unknown/unknown.
func platformsOf(list *v1.IndexManifest) (platforms map[string]v1.Hash, attestations int, err error) {
	var problems []string
	platforms = make(map[string]v1.Hash)
	for _, entry := range list.Manifests {
		switch {
		case entry.Annotations["vnd.docker.reference.type"] != "" || entry.Platform != nil && entry.Platform.OS == "unknown":
			attestations++
		case entry.Platform == nil:
			problems = append(problems, fmt.Sprintf("%s has no platform", entry.Digest))
		case !slices.Contains(published, entry.Platform.String()):
			problems = append(problems, fmt.Sprintf("%s is not a platform of derpd", entry.Platform))
		case platforms[entry.Platform.String()] != v1.Hash{}:
			problems = append(problems, fmt.Sprintf("%s is there twice", entry.Platform))
		default:
			platforms[entry.Platform.String()] = entry.Digest
		}
	}
	for _, platform := range published {
		if _, ok := platforms[platform]; !ok {
			problems = append(problems, platform+" is missing")
		}
	}
	if len(problems) > 0 {
		err = errors.New(strings.Join(problems, "; "))
	}
	return platforms, attestations, err
}
