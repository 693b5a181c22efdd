package config

import (
	"cmp"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"derpd/relay/admit"
)

// AdmissionEnv are the settings that all sources of admission share. The sources
// have structs of their own.
type AdmissionEnv struct {
	Grace        string `envconfig:"DERP_VERIFY_GRACE" default:"24h" desc:"how long a node that was admitted before stays admitted while a source of admission does not answer; 0 is not at all" zh:"准入来源不回答时，已放行过的节点在多长时间内仍可连接；0 表示不可"`
	Interval     string `envconfig:"DERP_VERIFY_INTERVAL" default:"1m" desc:"interval at which connected nodes are checked again, and Tailscale's API is asked for its devices (every 15s at most)" zh:"多久重新核对一次已连接的节点，以及多久向 Tailscale API 查询一次设备（最短 15 秒一次）"`
	DisallowApps string `envconfig:"DERP_DISALLOW_APPS" desc:"app names that may not connect, comma-separated" zh:"不允许连接的应用名，逗号分隔"`
}

// Admission says for how long an answer counts.
type Admission struct {
	Grace    time.Duration // how long an admitted node stays admitted while a source does not answer
	Interval time.Duration // between two checks of connected nodes

	// OpenOnOrder is true for a relay without sources whose operator has set
	// DERP_VERIFY_CLIENTS=false.
	OpenOnOrder bool

	DisallowApps []string
}

// Source is one configured source of admission. A new kind of source is a file
// of package relay/admit, and a file here that registers the kind, as url.go does.
type Source struct {
	Name     string // of its kind
	Variable string // variable that configures it
	Target   string // file, socket, URL without secrets, or tailnet that is asked; may be empty

	// New opens the source. Its error does not name variable.
	New func(log zerolog.Logger) (admit.Source, error)
}

// sourceKind is a kind of source. Each kind is one file, which calls
// registerSource.
type sourceKind struct {
	name   string
	closes string           // setting that closes an open relay
	env    func() sourceEnv // the kind's variables, all empty
}

// sourceEnv is a pointer to a struct of variables, as in [Env].
type sourceEnv interface {
	parse(p *problems, shared sharedByAll) parsedSources
}

// sharedByAll is what every kind of source may use.
type sharedByAll struct {
	grace, interval time.Duration
	files           map[string]string // path of each variable that was given as NAME_FILE
	roots           *x509.CertPool    // of servers; nil for the system's
}

// parsedSources are the sources of one kind.
type parsedSources struct {
	list     []Source
	later    []Source // that close a relay without any source when they appear
	warnings []string

	// open is true if the operator has switched this kind of source off.
	open bool
}

var registeredKinds []sourceKind

// registerSource is called by the init function of each kind's file.
func registerSource(kind sourceKind) { registeredKinds = append(registeredKinds, kind) }

// sourceKinds lists the kinds by name. Sources are asked in this order.
func sourceKinds() []sourceKind {
	return slices.SortedFunc(slices.Values(registeredKinds), func(a, b sourceKind) int { return cmp.Compare(a.name, b.name) })
}

// HowToClose is the advice for the operator of an open relay.
func HowToClose() string {
	var settings []string
	for _, kind := range sourceKinds() {
		settings = append(settings, kind.closes)
	}
	return "to close it, set " + either(settings)
}

// parseAdmission returns the sources, in the order in which they are asked, those that
// close an open relay when they appear, and warnings.
func parseAdmission(p *problems, e *environment, roots roots) (a Admission, sources, later []Source, warnings []string) {
	a = Admission{
		Grace:        p.duration("DERP_VERIFY_GRACE", e.Grace, durationExamples, 0),
		Interval:     p.duration("DERP_VERIFY_INTERVAL", e.Interval, durationExamples, time.Second),
		DisallowApps: p.list("DERP_DISALLOW_APPS", e.DisallowApps),
	}
	for _, env := range e.sources {
		parsed := env.parse(p, sharedByAll{grace: a.Grace, interval: a.Interval, files: e.files, roots: roots.others})
		sources = append(sources, parsed.list...)
		later = append(later, parsed.later...)
		warnings = append(warnings, parsed.warnings...)
		a.OpenOnOrder = a.OpenOnOrder || parsed.open
	}
	a.OpenOnOrder = a.OpenOnOrder && len(sources) == 0
	if len(sources) > 0 {
		later = nil
	}
	return a, sources, later, warnings
}

const durationExamples = "24h, 5m or 30s"

// opened is the New of a source that opens nothing.
func opened(source admit.Source) func(zerolog.Logger) (admit.Source, error) {
	return func(zerolog.Logger) (admit.Source, error) { return source, nil }
}

// isPath reports whether a value is meant as the path of a file.
func isPath(value string) bool {
	return strings.HasPrefix(value, "/") || strings.HasPrefix(value, "./") || strings.HasPrefix(value, "../")
}
