package main

import (
	"context"
	"encoding/json"
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
)

// images asks registries about images, as anybody may.
type images struct {
	// registry is asked instead of the image's own one, if it is set.
	registry string
}

// errNoImage is the answer that there is no such image.
var errNoImage = errors.New("no such image")

const (
	// patience is how long one question may take.
	patience = 20 * time.Second
	// sizeLimit is far above the size of any manifest or configuration.
	sizeLimit = 4 << 20
	// manifests are the kinds of manifest that are understood.
	manifests = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, " +
		"application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
	// baseDigest is the label that names what an image is based on.
	baseDigest = "org.opencontainers.image.base.digest"
)

// nextBase is the image of Debian's next release:
// gcr.io/distroless/static-debian14:nonroot for static-debian13:nonroot.
func nextBase(image string) (string, bool) {
	m := regexp.MustCompile(`^(.*-debian)(\d+)(:.*)?$`).FindStringSubmatch(image)
	if m == nil {
		return "", false
	}
	n, err := strconv.Atoi(m[2])
	return fmt.Sprintf("%s%d%s", m[1], n+1, m[3]), err == nil
}

// reference splits HOST/NAME:TAG as the docker command reads it.
func reference(image string) (host, name, tag string) {
	name, tag, found := strings.Cut(image, ":")
	if slash := strings.LastIndex(image, "/"); strings.Contains(tag, "/") {
		// The colon was the port's.
		rest, after, ok := strings.Cut(image[slash:], ":")
		name, tag, found = image[:slash]+rest, after, ok
	}
	if !found {
		tag = "latest"
	}
	host, rest, found := strings.Cut(name, "/")
	switch {
	case found && (strings.ContainsAny(host, ".:") || host == "localhost"):
		return host, rest, tag
	case found:
		return "registry-1.docker.io", name, tag
	}
	return "registry-1.docker.io", "library/" + name, tag
}

// digest is the digest of an image for all its platforms.
func (i images) digest(ctx context.Context, image string) (string, error) {
	host, name, tag := reference(image)
	_, header, err := i.ask(ctx, http.MethodHead, host, name, "manifests/"+tag)
	if err != nil {
		return "", err
	}
	digest := header.Get("Docker-Content-Digest")
	if digest == "" {
		return "", fmt.Errorf("%s: the registry does not tell its digest", image)
	}
	return digest, nil
}

// labels are the labels of an image, of its first platform: they are the same
// for all.
func (i images) labels(ctx context.Context, image string) (map[string]string, error) {
	host, name, tag := reference(image)
	var manifest struct {
		Manifests []struct{ Digest string }
		Config    struct{ Digest string }
	}
	if err := i.read(ctx, host, name, "manifests/"+tag, &manifest); err != nil {
		return nil, err
	}
	if len(manifest.Manifests) > 0 {
		if err := i.read(ctx, host, name, "manifests/"+manifest.Manifests[0].Digest, &manifest); err != nil {
			return nil, err
		}
	}
	var blob struct {
		Config struct{ Labels map[string]string }
	}
	err := i.read(ctx, host, name, "blobs/"+manifest.Config.Digest, &blob)
	return blob.Config.Labels, err
}

func (i images) read(ctx context.Context, host, name, what string, v any) error {
	body, _, err := i.ask(ctx, http.MethodGet, host, name, what)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%s/%s %s: %w", host, name, what, err)
	}
	return nil
}

// ask asks the registry of the image, and once more with the pass that it
// gives to everybody if it wants one.
func (i images) ask(ctx context.Context, method, host, name, what string) ([]byte, http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	registry := "https://" + host
	if i.registry != "" {
		registry = strings.TrimSuffix(i.registry, "/")
	}
	address := registry + "/v2/" + name + "/" + what
	status, body, header, err := request(ctx, method, address, "")
	if err == nil && status == http.StatusUnauthorized {
		var token string
		if token, err = pass(ctx, header.Get("WWW-Authenticate")); err == nil {
			status, body, header, err = request(ctx, method, address, token)
		}
	}
	switch {
	case err != nil:
		return nil, nil, err
	case status == http.StatusNotFound:
		return nil, nil, errNoImage
	case status != http.StatusOK:
		return nil, nil, fmt.Errorf("%s: %d %s", address, status, http.StatusText(status))
	}
	return body, header, nil
}

// pass gets a token for what the challenge of a registry names.
func pass(ctx context.Context, challenge string) (string, error) {
	fields := map[string]string{}
	for _, m := range regexp.MustCompile(`(\w+)="([^"]*)"`).FindAllStringSubmatch(challenge, -1) {
		fields[m[1]] = m[2]
	}
	realm, err := url.Parse(fields["realm"])
	if err != nil || realm.Host == "" {
		return "", fmt.Errorf("the registry wants a password: %q", challenge)
	}
	query := realm.Query()
	for _, name := range []string{"service", "scope"} {
		if fields[name] != "" {
			query.Set(name, fields[name])
		}
	}
	realm.RawQuery = query.Encode()
	status, body, _, err := request(ctx, http.MethodGet, realm.String(), "")
	if err != nil {
		return "", err
	}
	var answer struct {
		Token       string
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil || status != http.StatusOK {
		return "", fmt.Errorf("%s gives no pass: %d %s", realm.Host, status, http.StatusText(status))
	}
	if answer.Token == "" {
		return answer.AccessToken, nil
	}
	return answer.Token, nil
}

func request(ctx context.Context, method, address, token string) (int, []byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header.Set("Accept", manifests)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, sizeLimit))
	return res.StatusCode, body, res.Header, err
}

// printBase prints the base image as a name that never moves. A release is made
// anew when its base is another one by now; all else in it comes from the commit.
func printBase(ctx context.Context, images images, published []string, stdout io.Writer) (outputs, error) {
	text, err := os.ReadFile(dockerfile)
	if err != nil {
		return nil, err
	}
	name, err := baseImage(string(text))
	if err != nil {
		return nil, err
	}
	digest, err := images.digest(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var out outputs
	out.set("base", name+"@"+digest)
	out.set("digest", digest)
	if _, err := fmt.Fprintf(stdout, "%s@%s\n", name, digest); err != nil {
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
			_, err = fmt.Fprintf(stdout, "%s is built on another one: %q\n", image, labels[baseDigest])
		} else {
			_, err = fmt.Fprintf(stdout, "%s is built on this one\n", image)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
