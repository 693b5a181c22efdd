package node

import (
	"crypto/tls"
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
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/config"
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
		{fredliangDomain, config.ModeLetsEncrypt, ":443", ":80", ":3478", nil, nil},
		{fredliangManual, config.ModeManual, ":33445", ":33446", ":3478", []string{socket}, nil},
		{fredliangURL, config.ModeLetsEncrypt, ":443", "", "", nil, []string{"https://headscale.example.com/verify"}},
	} {
		dir := t.TempDir()
		pair("derp.example.com", "derp.example.com", time.Now())(t, dir)
		env := environmentOf(t, strings.ReplaceAll(tt.compose, "DERP_CERT_DIR=/app/certs", "DERP_CERT_DIR="+dir))
		c, err := config.Load(append(env, "DERP_DATA_DIR="+dir))
		if err != nil {
			t.Errorf("%v, with\n%s", err, tt.compose)
			continue
		}
		// Without DERP_VERIFY_CLIENTS, the socket of this machine may be there.
		var sockets, urls []string
		for _, source := range c.Sources {
			switch source.Name {
			case "url":
				urls = append(urls, source.Target)
			case "tailscaled":
				if strings.Contains(tt.compose, "DERP_VERIFY_CLIENTS") {
					sockets = append(sockets, source.Target)
				}
			}
		}
		got := []string{c.Certificate.Mode, c.Listen.HTTPS, c.Listen.HTTP, c.Listen.STUN}
		if want := []string{tt.mode, tt.addr, tt.http, tt.stun}; !slices.Equal(got, want) || !slices.Equal(sockets, tt.sockets) || !slices.Equal(urls, tt.urls) {
			t.Errorf("got %q %q %q, want %q %q %q, with\n%s", got, sockets, urls, want, tt.sockets, tt.urls, tt.compose)
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

	n := begin(t, testkit.Environ(t, "DERP_DATA_DIR="+data, "DERP_DOMAIN=derp.example.com", "DERP_CERT_MODE=manual", "DERP_CERT_DIR="+certdir))
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

// fredliangPrivate is fredliang/derper with the certificate of a private authority,
// which every client has installed.
const fredliangPrivate = `
services:
  derper:
    image: fredliang/derper
    ports: ["443:443", "3478:3478/udp"]
    volumes:
      - ./certs:/app/certs
    environment:
      - DERP_DOMAIN=derp.example.com
      - DERP_CERT_MODE=manual
      - DERP_CERT_DIR=/app/certs
      - DERP_ADDR=127.0.0.1:0
      - DERP_VERIFY_CLIENTS=false
`

// TestFromFredliangPrivateAuthority starts derpd with the files of a private
// authority that fredliang/derper serves: NAME.crt has the leaf alone, or with its
// intermediate. Clients that trust the authority's root exchange packets by the
// printed map, and others do not connect.
func TestFromFredliangPrivateAuthority(t *testing.T) {
	const name = "derp.example.com"
	root := testkit.NewAuthority(t)
	middle := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"Test Intermediate"}, CA: true, Issuer: root})
	leaf := func(issuer *tls.Certificate) *tls.Certificate {
		return testkit.NewCertificate(t, testkit.Certificate{Names: []string{name}, Issuer: issuer})
	}
	for what, chain := range map[string][]*tls.Certificate{
		"leaf alone":             {leaf(root)},
		"leaf and intermediate":  {leaf(middle), middle},
		"intermediate and root":  {leaf(middle), middle, root},
		"root before the others": {leaf(middle), root, middle},
	} {
		for _, mounted := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, %t", what, mounted), func(t *testing.T) {
				data := t.TempDir()
				certdir := filepath.Join(data, "certs") // the target of the image's link /app/certs
				compose := strings.ReplaceAll(fredliangPrivate, "DERP_CERT_DIR=/app/certs", "DERP_CERT_DIR="+certdir)
				if mounted {
					compose = strings.ReplaceAll(fredliangPrivate, "      - DERP_CERT_DIR=/app/certs\n", "")
				}
				if err := os.Mkdir(certdir, 0o755); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(certdir, name)
				testkit.WritePair(t, path+".crt", path+".key", chain...)
				before := tree(t, certdir)

				env := append(testkit.Environ(t, "DERP_DATA_DIR="+data), environmentOf(t, compose)...)
				n := begin(t, env)
				r := region(t, parsePolicy(t, n.printed))
				if node := r.Nodes[0]; node.CertName != "" || node.InsecureForTests {
					t.Errorf("the map has the certificate name %q, insecure: %t", node.CertName, node.InsecureForTests)
				}
				a, _ := exchangeOver(t, r, func(c *derphttp.Client) { c.TLSConfig = testkit.Trust(testkit.Pool(root)) })
				if state, ok := a.TLSConnectionState(); !ok || !state.PeerCertificates[0].Equal(chain[0].Leaf) {
					t.Error("the relay serves another certificate than the file's")
				}
				stranger := testkit.RegionClient(t, r, key.NewNode())
				stranger.TLSConfig = testkit.Trust(testkit.Pool(testkit.NewAuthority(t)))
				if err := stranger.Connect(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
					t.Errorf("a client without the root: %v", err)
				}
				if !slices.Equal(before, tree(t, certdir)) {
					t.Error("the relay changed the certificate directory")
				}
			})
		}
	}
}
