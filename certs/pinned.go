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

	"tailscale.com/atomicfile"
)

const (
	pinnedYears = 10

	// pinnedBackdate lets clients in whose clocks are behind: they check
	// NotBefore of a pinned certificate too.
	pinnedBackdate = 24 * time.Hour
)

// LoadPinned reads the pinned certificate and key from path. The error wraps
// [fs.ErrNotExist] when there is no file. The certificate must cover every DNS
// name in names, since clients check the name they dial also when they pin;
// addresses they do not check.
func LoadPinned(path string, names []string, now time.Time) (Manager, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading pinned certificate: %w", err)
	}
	cert, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, fmt.Errorf("pinned certificate %s is damaged: %w; restore it from a backup, or remove it to get a new one (its hash changes: paste the new map)", path, err)
	}
	leaf := cert.Leaf
	for _, name := range names {
		if net.ParseIP(name) != nil {
			continue
		}
		if leaf.VerifyHostname(name) != nil {
			return nil, fmt.Errorf("pinned certificate %s covers %s, not %s; remove it to get a new one (its hash changes: paste the new map)", path, covered(leaf), name)
		}
	}
	if now.After(leaf.NotAfter) {
		return nil, fmt.Errorf("pinned certificate %s expired on %s; remove it to get a new one (its hash changes: paste the new map)", path, leaf.NotAfter.Format(time.DateOnly))
	}
	return newFixed(&cert, Pin(leaf)), nil
}

// LoadOrCreatePinned reads the pinned certificate from path, or makes one there
// for the given names and addresses when there is no file. Certificate and key
// are one file, mode 0600, so that no crash can part them.
func LoadOrCreatePinned(path string, names []string, now time.Time) (Manager, error) {
	m, err := LoadPinned(path, names, now)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	data, err := newPinned(names, now)
	if err != nil {
		return nil, fmt.Errorf("making pinned certificate: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("making certificate directory: %w", err)
	}
	if err := atomicfile.WriteFile(path, data, 0o600); err != nil {
		return nil, fmt.Errorf("writing pinned certificate: %w", err)
	}
	return LoadPinned(path, names, now)
}

func newPinned(names []string, now time.Time) ([]byte, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "derpd"},
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
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, block := range []*pem.Block{{Type: "CERTIFICATE", Bytes: der}, {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := pem.Encode(&out, block); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
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
