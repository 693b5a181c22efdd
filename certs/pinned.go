package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/atomicfile"
)

const (
	pinnedYears = 10

	// pinnedBackdate lets clients in whose clocks are behind: they check
	// NotBefore of a pinned certificate too.
	pinnedBackdate = 24 * time.Hour
)

// PinnedConfig says where the pinned certificate is kept.
type PinnedConfig struct {
	// Path is one file with certificate and key, PEM, mode 0600, so that no
	// crash can part them.
	Path string

	// Names are the DNS names and addresses by which clients dial. They
	// check the name also when they pin; an address they do not check.
	Names []string

	Log zerolog.Logger
}

// LoadPinned reads the pinned certificate, and reads it again when it changes.
// The error wraps [fs.ErrNotExist] when there is none and there never was. It
// does not when the file was lost, which the pin beside it tells: clients
// expect that certificate and no other.
func LoadPinned(c PinnedConfig) (Manager, error) {
	return newFiles([]string{c.Path}, c.load, c.Log)
}

func (c PinnedConfig) load() (*tls.Certificate, error) {
	data, err := os.ReadFile(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		if pin, err := os.ReadFile(c.pinPath()); err == nil {
			return nil, fmt.Errorf("pinned certificate %s is lost: clients expect %s; restore it from a backup, or %s", c.Path, bytes.TrimSpace(pin), rotateHint)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading pinned certificate: %w", err)
	}
	cert, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, fmt.Errorf("pinned certificate %s is damaged: %w; restore it from a backup, or %s", c.Path, err, rotateHint)
	}
	for _, name := range c.Names {
		if net.ParseIP(name) == nil && cert.Leaf.VerifyHostname(name) != nil {
			return nil, fmt.Errorf("pinned certificate %s covers %s, not %s; %s", c.Path, covered(cert.Leaf), name, rotateHint)
		}
	}
	if time.Now().After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("pinned certificate %s expired on %s; %s", c.Path, cert.Leaf.NotAfter.Format(time.DateOnly), rotateHint)
	}
	return &cert, nil
}

// rotateHint is the fix that changes the relay's identity: never done unasked.
const rotateHint = "make a new one with `derpd pin --rotate` and paste the new map"

// pinPath holds the pin in clear: it is not secret, and it tells a lost
// certificate from a first start.
func (c PinnedConfig) pinPath() string { return c.Path + ".pin" }

// LoadOrCreatePinned is LoadPinned, but makes a certificate when there never
// was one.
func LoadOrCreatePinned(c PinnedConfig) (Manager, error) {
	m, err := LoadPinned(c)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	if err := RotatePinned(c, time.Now()); err != nil {
		return nil, err
	}
	return LoadPinned(c)
}

// RotatePinned makes a new pinned certificate in place of the old one, valid
// from now for ten years. A relay that runs takes it at once, and clients need
// the new map.
func RotatePinned(c PinnedConfig, now time.Time) error {
	leaf, data, err := newPinned(c.Names, now)
	if err != nil {
		return fmt.Errorf("making pinned certificate: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(c.Path), 0o700); err != nil {
		return fmt.Errorf("making certificate directory: %w", err)
	}
	if err := atomicfile.WriteFile(c.Path, data, 0o600); err != nil {
		return fmt.Errorf("writing pinned certificate: %w", err)
	}
	if err := atomicfile.WriteFile(c.pinPath(), []byte(Pin(leaf)+"\n"), 0o600); err != nil {
		return fmt.Errorf("writing pin: %w", err)
	}
	return nil
}

func newPinned(names []string, now time.Time) (leaf *x509.Certificate, file []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               subject(names),
		NotBefore:             now.Add(-pinnedBackdate),
		NotAfter:              now.AddDate(pinnedYears, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return nil, nil, err
	}
	if leaf, err = x509.ParseCertificate(der); err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	var out bytes.Buffer
	for _, block := range []*pem.Block{{Type: "CERTIFICATE", Bytes: der}, {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := pem.Encode(&out, block); err != nil {
			return nil, nil, err
		}
	}
	return leaf, out.Bytes(), nil
}

// subject names nothing that is not in the certificate anyway: scanners index
// certificates by their subject, and would find every derpd by the name of the
// program. One that is too long for the field is left out (RFC 5280, ub-common-name).
func subject(names []string) pkix.Name {
	if len(names) == 0 || len(names[0]) > 64 {
		return pkix.Name{}
	}
	return pkix.Name{CommonName: names[0]}
}

// covered lists the names of a certificate, for messages.
func covered(leaf *x509.Certificate) string {
	names := append([]string(nil), leaf.DNSNames...)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return "no name"
	}
	return strings.Join(names, ", ")
}
