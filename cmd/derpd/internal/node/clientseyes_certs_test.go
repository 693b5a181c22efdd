package node

import (
	"crypto/tls"
	"slices"
	"time"

	"derpd/internal/testkit"
)

func eyesRows() []situation {
	return slices.Concat(certificateRows())
}

// chain makes a chain of an authority: a leaf, changed by the functions, and its
// intermediate.
func (w *world) chain(root *tls.Certificate, change ...func(*testkit.Certificate)) []*tls.Certificate {
	w.Helper()
	return w.chainFrom(w.intermediate(root), change...)
}

func (w *world) intermediate(root *tls.Certificate, change ...func(*testkit.Certificate)) *tls.Certificate {
	w.Helper()
	c := testkit.Certificate{Names: []string{"Intermediate"}, CA: true, Issuer: root, NotAfter: time.Now().AddDate(5, 0, 0)}
	for _, f := range change {
		f(&c)
	}
	return testkit.NewCertificate(w, c)
}

func (w *world) chainFrom(issuer *tls.Certificate, change ...func(*testkit.Certificate)) []*tls.Certificate {
	w.Helper()
	c := testkit.Certificate{Names: []string{eyesName}, Issuer: issuer, NotAfter: time.Now().AddDate(0, 0, 80)}
	for _, f := range change {
		f(&c)
	}
	return []*tls.Certificate{testkit.NewCertificate(w, c), issuer}
}

// certificateRows are about certificates of authorities in files.
func certificateRows() []situation {
	return []situation{
		{
			name:  "a good chain",
			begin: func(w *world) { w.manual(w.chain(publicRoot)...) },
		},
		{
			name: "a private root that the client has",
			begin: func(w *world) {
				root := rootNamed(w, "Private Root")
				w.client.AddCert(root.Leaf)
				w.manual(append(w.chain(root), root)...)
			},
			health: `clients need "Private Root" installed`, log: `Private Root`, note: `clients need "Private Root" installed`,
		},
	}
}
