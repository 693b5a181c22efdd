package config

import (
	"crypto/x509"

	"derpd/internal/filekind"
)

// RootsEnv are the roots of servers that the relay asks.
type RootsEnv struct {
	CARoots string `envconfig:"DERP_CA_ROOTS" desc:"absolute path of a file with roots of private authorities, PEM. derpd trusts them beside the system's roots for the ACME authority, DERP_MESH_WITH, admission URLs and Tailscale's API" zh:"私有机构根证书文件的绝对路径，PEM。访问 ACME 机构、DERP_MESH_WITH、准入网址和 Tailscale API 时，derpd 除系统的根证书外也信任它们"`
}

// oldRoots is the old name of DERP_CA_ROOTS.
const oldRoots = "DERP_ACME_CA_ROOTS"

// Roots are the roots of the file alone, without the system's.
type Roots struct {
	Pool     *x509.CertPool // nil for none
	Variable string         // the variable that names the file
}

// roots verify the servers that the relay asks. A nil pool stands for the system's
// roots.
type roots struct {
	own       Roots
	authority *x509.CertPool // for the ACME authority
	others    *x509.CertPool // for all others
}

// parseRoots reads the file. With the old name, the ACME authority is verified by the
// roots of the file alone.
func parseRoots(p *problems, e *environment) roots {
	variable, path := "DERP_CA_ROOTS", e.CARoots
	switch {
	case path != "" && e.OldRoots != "":
		p.add(oldRoots, "is the old name of DERP_CA_ROOTS, which is set too; remove %s, and put all roots into one file", oldRoots)
		return roots{}
	case e.OldRoots != "":
		variable, path = oldRoots, e.OldRoots
	case path == "":
		return roots{}
	}
	path = p.path(variable, path)
	list, err := filekind.Certificates(path)
	if err != nil {
		p.add(variable, "%w%s", err, readHint(err))
		return roots{}
	}
	own := x509.NewCertPool()
	all, err := x509.SystemCertPool()
	if err != nil {
		all = x509.NewCertPool()
	}
	for _, root := range list {
		own.AddCert(root)
		all.AddCert(root)
	}
	found := roots{own: Roots{own, variable}, authority: all, others: all}
	if variable == oldRoots {
		found.authority = own
	}
	return found
}
