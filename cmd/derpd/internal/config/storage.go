package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"derpd/certs"
	"derpd/relay"
)

// StorageEnv are the directories.
type StorageEnv struct {
	DataDir string `envconfig:"DERP_DATA_DIR" default:"/data" desc:"directory of the node key; an absolute path" zh:"保存节点密钥的目录；绝对路径"`
	CertDir string `envconfig:"DERP_CERT_DIR" desc:"directory of certificates and ACME accounts; an absolute path" zh:"保存证书和 ACME 账户的目录；绝对路径" or:"certs in DERP_DATA_DIR" zhor:"DERP_DATA_DIR 下的 certs"`
}

// Storage are the directories, as absolute paths.
type Storage struct {
	DataDir string
	CertDir string
}

// NodeKeyFile is the file of the node key.
func (s Storage) NodeKeyFile() string { return filepath.Join(s.DataDir, "node.key") }

// MapCertFile is the file in which the relay remembers the CertName of its map.
func (s Storage) MapCertFile() string { return filepath.Join(s.DataDir, "mapcert.json") }

func parseStorage(p *problems, env StorageEnv) Storage {
	s := Storage{DataDir: p.path("DERP_DATA_DIR", env.DataDir)}
	s.CertDir = filepath.Join(s.DataDir, "certs")
	if env.CertDir != "" {
		s.CertDir = p.path("DERP_CERT_DIR", env.CertDir)
	}
	return s
}

// checkStorage checks the directories and what is stored in them. ownCertDir
// reports whether DERP_CERT_DIR is set, and checkPin whether a pinned certificate
// must be valid. It returns warnings.
func checkStorage(p *problems, s Storage, c Certificate, ownCertDir, checkPin bool) []string {
	data := checkDirectory(p, "DERP_DATA_DIR", s.DataDir)
	certDir := data
	switch {
	case !ownCertDir:
		certDir.readOnly = nil // reported with the data directory
	case c.Mode == ModeManual: // which only reads its files
		certDir = directory{}
	default:
		certDir = checkDirectory(p, "DERP_CERT_DIR", s.CertDir)
	}
	_, keyErr := relay.LoadKey(s.NodeKeyFile())
	if data.usable && keyErr != nil && !errors.Is(keyErr, fs.ErrNotExist) {
		p.add("DERP_DATA_DIR", "%w%s", keyErr, readHint(keyErr))
	}
	if checkPin && certDir.usable && c.Mode == ModePinned {
		checkPinned(p, c.Pinned)
	}
	return checkReadOnly(p, data, certDir, keyErr == nil, c, ownCertDir)
}

// checkReadOnly refuses a read-only directory only if something must be written
// there. A relay that has a key and a certificate must also start when its volume
// has become read-only. The warnings say what works for now.
func checkReadOnly(p *problems, data, certDir directory, hasKey bool, c Certificate, ownCertDir bool) []string {
	storesCertificates := c.Mode == ModePinned || c.Mode == ModeLetsEncrypt
	var warnings []string
	report := func(name string, readOnly error, complete, holdsCertificates bool) {
		switch {
		case !complete:
			p.add(name, "%w", readOnly)
		case holdsCertificates && c.Mode == ModeLetsEncrypt:
			warnings = append(warnings, fmt.Sprintf("%s: %v; the stored certificate is served, but cannot be renewed", name, readOnly))
		default:
			warnings = append(warnings, fmt.Sprintf("%s: %v; derpd works with the files that are stored there", name, readOnly))
		}
	}
	if data.readOnly != nil {
		holdsCertificates := storesCertificates && !ownCertDir
		report("DERP_DATA_DIR", data.readOnly, hasKey && (!holdsCertificates || certificateStored(c)), holdsCertificates)
	}
	if certDir.readOnly != nil && storesCertificates {
		report("DERP_CERT_DIR", certDir.readOnly, certificateStored(c), true)
	}
	return warnings
}

// certificateStored reports whether nothing must be written to the certificate
// directory for now.
func certificateStored(c Certificate) bool {
	if c.Mode == ModePinned {
		_, err := certs.LoadPinned(c.Pinned)
		return err == nil
	}
	return c.ACME.Stored()
}

// directory is the state of a directory.
type directory struct {
	usable   bool
	readOnly error // why it cannot be written to
}

// checkDirectory checks that path is a directory, or that it can be made.
func checkDirectory(p *problems, name, path string) directory {
	existing := filepath.Clean(path)
	info, err := os.Stat(existing)
	for errors.Is(err, fs.ErrNotExist) && existing != filepath.Dir(existing) {
		existing = filepath.Dir(existing)
		info, err = os.Stat(existing)
	}
	if err != nil {
		p.add(name, "%w", err)
		return directory{}
	}
	if !info.IsDir() {
		p.add(name, "want a directory, but %s is a file", existing)
		return directory{}
	}
	err = unix.Access(existing, unix.W_OK|unix.X_OK)
	if err == nil {
		return directory{usable: true}
	}
	fix := fmt.Sprintf("on the host: chown -R %d DIRECTORY, or use a named volume", os.Getuid())
	switch {
	case errors.Is(err, unix.EROFS):
		fix = "mount it for writing"
	case existing != filepath.Clean(path):
		fix = fmt.Sprintf("make %s for this user, or set %s to a directory of this user", path, name)
	}
	return directory{readOnly: fmt.Errorf("%s cannot be written to by uid %d: %w; %s", existing, os.Getuid(), err, fix)}
}
