package config

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"derpd/certs"
)

// The modes of DERP_CERT_MODE. gcp is another name of letsencrypt with Google's
// authority.
const (
	ModeLetsEncrypt = "letsencrypt"
	ModeManual      = "manual"
	ModePinned      = "pinned"
	ModeOff         = "off"

	modeGCP = "gcp"
)

// CertificateEnv are the mode, and certificates from files.
type CertificateEnv struct {
	Mode     string `envconfig:"DERP_CERT_MODE" desc:"letsencrypt (any ACME authority), manual (files), pinned (self-signed, its hash in the map), off (another program terminates TLS); gcp is letsencrypt with Google's authority" zh:"letsencrypt（任意 ACME 机构）、manual（证书文件）、pinned（自签名，哈希写进 DERPMap）、off（由别的程序终结 TLS）；gcp 即使用 Google 机构的 letsencrypt" or:"letsencrypt if DERP_DOMAIN starts with a name, else pinned" zhor:"DERP_DOMAIN 以域名开头时为 letsencrypt，否则为 pinned"`
	CertFile string `envconfig:"DERP_CERT_FILE" desc:"manual: absolute path of the certificate file, PEM, leaf first and then its issuers" zh:"manual 模式：证书文件的绝对路径，PEM，先叶子证书，再各级签发者" or:"NAME.crt in DERP_CERT_DIR" zhor:"DERP_CERT_DIR 下的 NAME.crt"`
	KeyFile  string `envconfig:"DERP_KEY_FILE" desc:"manual: absolute path of the private key file, PEM" zh:"manual 模式：私钥文件的绝对路径，PEM" or:"NAME.key in DERP_CERT_DIR" zhor:"DERP_CERT_DIR 下的 NAME.key"`
}

// Certificate says how the relay gets its certificate. Only the part of its mode
// is set, and Pinned always.
type Certificate struct {
	Mode       string // ModeLetsEncrypt, ModeManual, ModePinned or ModeOff
	Manual     certs.ManualConfig
	Pinned     certs.PinnedConfig
	ACME       certs.ACMEConfig // without what is known when listening
	Challenges Challenges       // of ACME
}

// parseCertificate decides the mode, and reads the files of mode manual. It
// returns a warning if it uses mode pinned in place of manual.
func parseCertificate(p *problems, env CertificateEnv, domains []string, storage Storage, roots Roots) (c Certificate, fallback string) {
	c = Certificate{
		Mode:   parseMode(p, env.Mode, domains),
		Pinned: certs.PinnedConfig{Path: filepath.Join(storage.CertDir, "pinned.pem"), Names: domains},
	}
	if c.Mode != ModeManual {
		return c, ""
	}
	c.Manual = manualFiles(p, env, domains, storage)
	if c.Manual.CertFile == "" {
		return c, ""
	}
	c.Manual.Private = roots.Pool
	// derper makes a self-signed certificate in this one case; derpd uses the
	// pinned one.
	if _, err := os.Stat(c.Manual.CertFile); env.CertFile == "" && errors.Is(err, fs.ErrNotExist) && net.ParseIP(domains[0]) != nil {
		fallback = "DERP_CERT_MODE is manual, DERP_DOMAIN is an address and " + c.Manual.CertFile + " does not exist: using a pinned certificate, as with DERP_CERT_MODE=pinned"
		c.Mode, c.Manual = ModePinned, certs.ManualConfig{}
		return c, fallback
	}
	if _, err := certs.LoadManual(c.Manual); err != nil {
		p.add("DERP_CERT_FILE", "%w%s", err, readHint(err))
	}
	return c, ""
}

// parseMode returns the mode; empty if there is no such mode.
func parseMode(p *problems, mode string, domains []string) string {
	switch mode {
	case ModeLetsEncrypt, ModeManual, ModePinned, ModeOff:
		return mode
	case modeGCP:
		return ModeLetsEncrypt
	case "":
		if len(domains) > 0 && net.ParseIP(domains[0]) == nil {
			return ModeLetsEncrypt
		}
		return ModePinned
	}
	p.add("DERP_CERT_MODE", "want letsencrypt, manual, pinned, off or gcp, got %q", mode)
	return ""
}

// unsafeInFileName is what derper leaves out of a file name (cmd/derper/cert.go).
var unsafeInFileName = regexp.MustCompile(`[^a-zA-Z0-9-.]`)

// manualFiles returns the files of mode manual, which derper names by the first
// domain. It returns the zero value if they are not known.
func manualFiles(p *problems, env CertificateEnv, domains []string, storage Storage) certs.ManualConfig {
	certFile, keyFile := p.path("DERP_CERT_FILE", env.CertFile), p.path("DERP_KEY_FILE", env.KeyFile)
	if certFile != "" && keyFile != "" {
		return certs.ManualConfig{CertFile: certFile, KeyFile: keyFile, Names: domains}
	}
	if certFile != "" || keyFile != "" {
		p.add("DERP_CERT_FILE", "want DERP_CERT_FILE and DERP_KEY_FILE together, got one of them; set the other one, or remove this one")
		return certs.ManualConfig{}
	}
	if len(domains) == 0 {
		refuseNoDomain(p, ModeManual)
		return certs.ManualConfig{}
	}
	base := filepath.Join(storage.CertDir, unsafeInFileName.ReplaceAllString(domains[0], ""))
	return certs.ManualConfig{CertFile: base + ".crt", KeyFile: base + ".key", Names: domains}
}

// refuseNoDomain refuses a mode that needs a name. A domain that is wrong is
// reported already.
func refuseNoDomain(p *problems, mode string) {
	if !p.has("DERP_DOMAIN") {
		p.add("DERP_DOMAIN", "want the name that the certificate is for, since DERP_CERT_MODE is %s; got nothing", mode)
	}
}

// refuseUnused refuses variables that the mode does not use: the operator expects
// another mode.
func refuseUnused(p *problems, e *environment, mode string) {
	if mode == "" || p.has("DERP_DOMAIN") && !e.given["DERP_CERT_MODE"] {
		return // the mode is not known
	}
	fix := "set that, or remove this"
	if e.given["DERP_CERT_MODE"] {
		fix = "remove one of the two"
	}
	refuse := func(names []string, use string) {
		for _, name := range names {
			if e.given[name] {
				p.add(name, "is only used with %s, but the mode is %s; %s", use, mode, fix)
			}
		}
	}
	if mode != ModeManual {
		refuse([]string{"DERP_CERT_FILE", "DERP_KEY_FILE"}, "DERP_CERT_MODE=manual")
	}
	if mode == ModeLetsEncrypt {
		return
	}
	for name := range e.given {
		if name != oldRoots && (strings.HasPrefix(name, "DERP_ACME_") || strings.HasPrefix(name, "DERP_DNS_")) {
			refuse([]string{name}, "DERP_CERT_MODE=letsencrypt")
		}
	}
}
