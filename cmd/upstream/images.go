package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// images reads images from registries. Where `docker login` has stored a login, images
// uses it: a package on GitHub is private at first, and so may others be.
type images struct {
	// registry is the URL of the registry that is used for every image; empty
	// for the registry in the image's name.
	registry string
}

// errNoImage means that the registry has no such image.
var errNoImage = errors.New("no such image")

const (
	// registryTimeout limits all requests about one image.
	registryTimeout = 20 * time.Second
	// baseDigest is the label with the digest of an image's base image.
	baseDigest = "org.opencontainers.image.base.digest"
)

func options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
}

// digest returns the digest of an image for all its platforms.
func (i images) digest(ctx context.Context, image string) (string, error) {
	ref, err := i.reference(image)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	found, err := remote.Head(ref, options(ctx)...)
	if err != nil {
		return "", registryError(err)
	}
	return found.Digest.String(), nil
}

// labels returns the labels of an image's first platform: derpd's labels are the
// same on every platform.
func (i images) labels(ctx context.Context, image string) (map[string]string, error) {
	ref, err := i.reference(image)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	found, err := remote.Get(ref, options(ctx)...)
	if err != nil {
		return nil, registryError(err)
	}
	first, err := firstPlatform(found)
	if err != nil {
		return nil, registryError(err)
	}
	config, err := first.ConfigFile()
	if err != nil {
		return nil, registryError(err)
	}
	return config.Config.Labels, nil
}

// firstPlatform returns the first image of an index. An image without an index has one
// platform, and is returned itself.
func firstPlatform(found *remote.Descriptor) (v1.Image, error) {
	if !found.MediaType.IsIndex() {
		return found.Image()
	}
	index, err := found.ImageIndex()
	if err != nil {
		return nil, err
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(list.Manifests) == 0 {
		return nil, errors.New("the image has no platform")
	}
	return index.Image(list.Manifests[0].Digest)
}

// reference parses the name of an image as the docker command does.
func (i images) reference(image string) (name.Reference, error) {
	ref, err := name.ParseReference(image)
	if err != nil || i.registry == "" {
		return ref, err
	}
	at, err := url.Parse(i.registry)
	if err != nil || at.Host == "" {
		return nil, fmt.Errorf("--registry: not a URL with a host (got %q); use https://HOST", i.registry)
	}
	var options []name.Option
	if at.Scheme == "http" {
		options = append(options, name.Insecure)
	}
	registry, err := name.NewRegistry(at.Host, options...)
	if err != nil {
		return nil, err
	}
	repository := registry.Repo(ref.Context().RepositoryStr())
	if _, ok := ref.(name.Digest); ok {
		return repository.Digest(ref.Identifier()), nil
	}
	return repository.Tag(ref.Identifier()), nil
}

// registryError turns the answer "not found" into errNoImage, and adds the fix to a
// refusal.
func registryError(err error) error {
	answer, ok := errors.AsType[*transport.Error](err)
	switch {
	case ok && answer.StatusCode == http.StatusNotFound:
		return errNoImage
	case ok && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden):
		return fmt.Errorf("%w; use docker login, or make the image public", err)
	}
	return err
}

// nextBase returns the name of the image on Debian's next release:
// gcr.io/distroless/static-debian14:nonroot for static-debian13:nonroot.
func nextBase(image string) (string, bool) {
	m := regexp.MustCompile(`^(.*-debian)(\d+)(:.*)?$`).FindStringSubmatch(image)
	if m == nil {
		return "", false
	}
	n, err := strconv.Atoi(m[2])
	return fmt.Sprintf("%s%d%s", m[1], n+1, m[3]), err == nil
}

// printBase prints the base image with its digest. With a published image, printBase
// also prints whether that image was built on another base. A new base is the only
// reason to repeat a release, because a commit determines the rest of the image.
func printBase(ctx context.Context, images images, published []string, stdout io.Writer) (outputs, error) {
	text, err := os.ReadFile(dockerfile)
	if err != nil {
		return nil, err
	}
	base, err := baseImage(string(text))
	if err != nil {
		return nil, err
	}
	digest, err := images.digest(ctx, base)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", base, err)
	}
	var out outputs
	out.set("base", base+"@"+digest)
	out.set("digest", digest)
	if _, err := fmt.Fprintf(stdout, "%s@%s\n", base, digest); err != nil {
		return nil, err
	}
	for _, image := range published {
		labels, err := images.labels(ctx, strings.ToLower(image))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", image, err)
		}
		changed := labels[baseDigest] != digest
		out.set("changed", strconv.FormatBool(changed))
		if changed {
			_, err = fmt.Fprintf(stdout, "%s was built on another base: %q\n", image, labels[baseDigest])
		} else {
			_, err = fmt.Fprintf(stdout, "%s was built on this base\n", image)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
