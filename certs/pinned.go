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
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/atomicfile"

	"derpd/internal/filekind"
)

const (
	// pinnedYears is the lifetime of a pinned certificate.
	pinnedYears = 10

	// pinnedBackdate is the tolerance for slow clocks of clients, which check
	// NotBefore of a pinned certificate too.
	pinnedBackdate = 24 * time.Hour
)

// PinnedConfig describes the pinned certificate.
type PinnedConfig struct {
	// Path is the file of the certificate and its key, PEM, mode 0600. With a
	// single file, no crash can leave a certificate without its key.
	Path string

	// Names are the DNS names and IP addresses that clients dial. Clients
	// with a pin still check a DNS name, but not an address.
	Names []string

	// Changed is that of [ManualConfig].
	Changed func(certName string)

	Log zerolog.Logger
}

// LoadPinned loads the pinned certificate. The manager reloads it when the file
// changes. A file that [RotatePinned] has not made waits for Accept.
//
// The error wraps [fs.ErrNotExist] only if there never was a certificate. A lost
// certificate is another error, because clients accept no new certificate. The file
// with the pin distinguishes the two cases.
func LoadPinned(c PinnedConfig) (Manager, error) {
	return newFiles([]string{c.Path, c.pinPath()}, c.load, c.Changed, c.Log)
}

func (c PinnedConfig) load() (loaded, error) {
	data, err := filekind.Regular(c.Path, filekind.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		if pin, err := filekind.Regular(c.pinPath(), filekind.MaxSize); err == nil {
			return loaded{}, fmt.Errorf("pinned certificate %s is lost: clients expect %s; restore it from a backup, or %s", c.Path, bytes.TrimSpace(pin), rotateHint)
		}
	}
	if err != nil {
		return loaded{}, fmt.Errorf("reading pinned certificate: %w", err)
	}
	cert, err := tls.X509KeyPair(data, data)
	if err != nil {
		return loaded{}, fmt.Errorf("pinned certificate %s is damaged: %w; restore it from a backup, or %s", c.Path, err, rotateHint)
	}
	for _, name := range c.Names {
		if net.ParseIP(name) == nil && cert.Leaf.VerifyHostname(name) != nil {
			return loaded{}, fmt.Errorf("pinned certificate %s covers %s, not %s; %s", c.Path, covered(cert.Leaf), name, rotateHint)
		}
	}
	check := func(now time.Time) error {
		if now.After(cert.Leaf.NotAfter) {
			return fmt.Errorf("pinned certificate %s expired on %s; %s", c.Path, cert.Leaf.NotAfter.Format(time.DateOnly), rotateHint)
		}
		return nil
	}
	pin, _ := filekind.Regular(c.pinPath(), filekind.MaxSize) // written after the certificate by RotatePinned alone
	return loaded{cert: &cert, check: check, meant: string(bytes.TrimSpace(pin)) == Pin(cert.Leaf)}, check(time.Now())
}

// rotateHint is a fix that needs a new map on every client, so only the operator may
// apply it.
const rotateHint = "make a new one with `derpd pin --rotate` and paste the new map"

// pinPath is the file of the pin. The file distinguishes a lost certificate from a
// first start. The pin is public.
func (c PinnedConfig) pinPath() string { return c.Path + ".pin" }

// LoadOrCreatePinned is LoadPinned, but creates a certificate if there never was
// one.
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

// RotatePinned replaces the pinned certificate by a new one, valid from now for ten
// years. A running relay reloads the certificate, and clients then need the new map.
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

// newPinned makes a self-signed certificate and the content of its file.
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

// subject returns the first name as the certificate's subject, or nothing if the
// name is too long (RFC 5280, ub-common-name). The subject does not name derpd,
// because scanners index certificates by subject and would find every relay.
func subject(names []string) pkix.Name {
	if len(names) == 0 || len(names[0]) > 64 {
		return pkix.Name{}
	}
	return pkix.Name{CommonName: names[0]}
}
