package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// The files are typical compose files for the image fredliang/derper. To change
// to derpd, people change only the line image.
const (
	fredliangDomain = `
services:
  derper:
    image: fredliang/derper
    restart: always
    ports: ["80:80", "443:443", "3478:3478/udp"]
    environment:
      - DERP_DOMAIN=derper.your-domain.com
`
	fredliangManual = `
services:
  derper:
    image: fredliang/derper:latest
    ports: ["33445:33445", "33446:33446", "3478:3478/udp"]
    volumes:
      - ./certs:/app/certs
      - /var/run/tailscale/tailscaled.sock:/var/run/tailscale/tailscaled.sock
    environment:
      - DERP_DOMAIN=derp.example.com
      - DERP_CERT_MODE=manual
      - DERP_CERT_DIR=/app/certs
      - DERP_ADDR=:33445
      - DERP_HTTP_PORT=33446
      - DERP_VERIFY_CLIENTS=true
`
	fredliangURL = `
services:
  derper:
    image: fredliang/derper
    environment:
      - DERP_DOMAIN=derp.example.com
      - DERP_STUN=false
      - DERP_HTTP_PORT=-1
      - DERP_VERIFY_CLIENTS=false
      - DERP_VERIFY_CLIENT_URL=https://headscale.example.com/verify
`
)

// environmentOf is the environment of the container in a compose file.
func environmentOf(t *testing.T, compose string) []string {
	t.Helper()
	var file struct {
		Services map[string]struct {
			Environment []string `yaml:"environment"`
		} `yaml:"services"`
	}
	if err := yaml.Unmarshal([]byte(compose), &file); err != nil {
		t.Fatal(err)
	}
	return file.Services["derper"].Environment
}

func TestFromFredliang(t *testing.T) {
	const socket = "/var/run/tailscale/tailscaled.sock"
	for _, tt := range []struct {
		compose                string
		mode, addr, http, stun string
		sockets, urls          []string
	}{
		{fredliangDomain, modeLetsEncrypt, ":443", ":80", ":3478", nil, nil},
		{fredliangManual, modeManual, ":33445", ":33446", ":3478", []string{socket}, nil},
		{fredliangURL, modeLetsEncrypt, ":443", "", "", nil, []string{"https://headscale.example.com/verify"}},
	} {
		dir := t.TempDir()
		pair("derp.example.com", "derp.example.com", time.Now())(t, dir)
		env := environmentOf(t, strings.ReplaceAll(tt.compose, "DERP_CERT_DIR=/app/certs", "DERP_CERT_DIR="+dir))
		c, err := loadConfig(append(env, "DERP_DATA_DIR="+dir))
		if err != nil {
			t.Errorf("%v, with\n%s", err, tt.compose)
			continue
		}
		// Without DERP_VERIFY_CLIENTS, derpd uses the socket of this
		// machine if there is one.
		sockets := c.sockets
		if tt.sockets == nil && c.loaded.Verify == "auto" {
			sockets = nil
		}
		got := []string{c.mode, c.addr, c.httpAddr, c.stunAddr}
		if want := []string{tt.mode, tt.addr, tt.http, tt.stun}; !slices.Equal(got, want) || !slices.Equal(sockets, tt.sockets) || !slices.Equal(c.verifyURLs, tt.urls) {
			t.Errorf("got %q %q %q, want %q %q %q, with\n%s", got, sockets, c.verifyURLs, want, tt.sockets, tt.urls, tt.compose)
		}
	}
}

// halves writes a self-signed pair as derper wants it, NAME.crt and NAME.key.
func halves(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	testkit.WritePair(t, path+".crt", path+".key", testkit.SelfSigned(t, name))
}

// TestFromDerper starts derpd with the files of a derper. The node key and the
// certificate stay, and derpd does not change the files.
func TestFromDerper(t *testing.T) {
	data, certdir := t.TempDir(), t.TempDir()
	// derper's writeNewConfig writes /var/lib/derper/derper.key like this.
	private := key.NewNode()
	config, err := json.MarshalIndent(struct{ PrivateKey key.NodePrivate }{private}, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	file("node.key", string(config))(t, data)
	halves(t, certdir, "derp.example.com")
	before := tree(t, certdir)

	n := begin(t, loopbackEnv(t, "DERP_DATA_DIR="+data, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=manual", "DERP_CERT_DIR="+certdir))
	a, _ := exchangeOver(t, region(t, parsePolicy(t, n.printed)), nil)
	if got := a.ServerPublicKey(); got != private.Public() {
		t.Errorf("the relay is %s, derper was %s", got, private.Public())
	}
	state, ok := a.TLSConnectionState()
	want, err := os.ReadFile(filepath.Join(certdir, "derp.example.com.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if !ok || !slices.Equal(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: state.PeerCertificates[0].Raw}), want) {
		t.Error("the relay serves another certificate than the file's")
	}
	if !slices.Equal(before, tree(t, certdir)) {
		t.Error("the relay changed the certificate directory")
	}
}

// TestManualFilesAreOnlyRead uses a certificate directory that derpd may read
// but not write.
func TestManualFilesAreOnlyRead(t *testing.T) {
	dir, err := os.MkdirTemp("", "derpd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	data, certdir := filepath.Join(dir, "data"), filepath.Join(dir, "certs")
	halves(t, certdir, "derp.example.com")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{
		dir: 0o755, data: 0o777, certdir: 0o555,
		filepath.Join(certdir, "derp.example.com.crt"): 0o444, filepath.Join(certdir, "derp.example.com.key"): 0o444,
	} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	stderr, code := asNobody(t, dir, []string{"env"}, "DERP_DATA_DIR="+data, "DERP_CERT_DIR="+certdir, "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com")
	if code != exitOK {
		t.Error(fmt.Sprint("exit code ", code, ": "), stderr)
	}
}
