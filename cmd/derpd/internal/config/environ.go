package config

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/kelseyhightower/envconfig"

	"derpd/certs"
	"derpd/internal/filekind"
)

// Env is every variable as text, in the order of the documentation. envconfig
// fills it. The sources of admission and the DNS providers have structs of their
// own.
type Env struct {
	NamesEnv
	ListenEnv
	StorageEnv
	CertificateEnv
	ACMEEnv
	DNSEnv
	RootsEnv
	AdmissionEnv
	TellEnv
	NodeLimitsEnv
	RegionEnv
	MeshEnv
	ProxiesEnv
	LimitsEnv
	WebEnv
	UpdatesEnv
	LogEnv
}

// environment is the environment as it was read.
type environment struct {
	Env
	sources   []sourceEnv                   // of admission, one of each kind
	providers map[string]certs.DNSVariables // of DNS, by name

	order    map[string]int    // position of each variable in the documentation
	platform *platform         // nil on none that is known
	assumed  []string          // variables that the platform has set; they are not given
	given    map[string]bool   // variables that the operator has set
	files    map[string]string // path of each variable that was given as NAME_FILE
	ignored  []string          // variables that Docker or Kubernetes injected
}

// readEnvironment resolves the variables and fills the structs.
func readEnvironment(environ []string, p *problems) *environment {
	e := &environment{
		providers: make(map[string]certs.DNSVariables),
		order:     make(map[string]int),
		given:     make(map[string]bool),
		files:     make(map[string]string),
	}
	for _, kind := range sourceKinds() {
		e.sources = append(e.sources, kind.env())
	}
	for _, provider := range certs.DNSProviders() {
		e.providers[provider.Name] = provider.Variables()
	}
	known := e.variables()
	for i, v := range known {
		e.order[v.Name] = i
	}
	values := e.resolve(environ, known, p)
	if err := fill(values, known, e.structs()); err != nil {
		p.add("environment", "%w", err)
	}
	return e
}

// structs are all structs of variables.
func (e *environment) structs() []any {
	list := []any{&e.Env}
	for _, source := range e.sources {
		list = append(list, source)
	}
	for _, provider := range certs.DNSProviders() {
		list = append(list, e.providers[provider.Name])
	}
	return list
}

// derperDebug are variables with our prefix that upstream's code reads.
var derperDebug = []string{"DERP_DEBUG_LOGS", "DERP_PROBER_DEBUG_LOGS"}

// resolve returns the value of each known variable that has one. A variable that
// is empty counts as not set, because Compose passes on variables that way.
func (e *environment) resolve(environ []string, known []Variable, p *problems) map[string]string {
	lines := make(map[string]bool) // known variables, and whether they may have several lines
	secrets := make(map[string]bool)
	for _, v := range known {
		lines[v.Name] = v.tag("lines") == "true"
		secrets[v.Name] = v.Secret()
	}
	ours, outside := make(map[string]string), make(map[string]string)
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		if strings.HasPrefix(name, "DERP_") {
			ours[name] = value
		} else {
			outside[name] = value
		}
	}
	values := make(map[string]string)
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		value := ours[name]
		_, isKnown := lines[name]
		target, isFile := strings.CutSuffix(name, "_FILE")
		_, targetKnown := lines[target]
		switch {
		case value == "" || slices.Contains(derperDebug, name):
		case injected(name, value, isKnown):
			e.ignored = append(e.ignored, name)
		case isKnown:
			e.given[name] = true
			values[name] = p.bareValue(name, value, lines[name])
		case isFile && targetKnown:
			e.given[target] = true
			path := p.bareValue(name, value, false)
			if secrets[target] && path != "" && !filepath.IsAbs(path) {
				// It may be the secret in place of a path.
				p.add(name, "want the absolute path of a file that holds the secret, got something else")
				continue
			}
			e.files[target] = p.path(name, path)
		default:
			p.add(name, "unknown variable%s", suggestion(name, lines))
		}
	}
	e.readFiles(ours, values, lines, p)
	maps.DeleteFunc(values, func(_, value string) bool { return value == "" })
	if e.platform = detectPlatform(outside, values); e.platform != nil {
		e.assumed = e.platform.assume(values)
	}
	return values
}

// readFiles adds the values that files hold. ours are the variables as given, and lines
// says whether a variable may have several lines.
func (e *environment) readFiles(ours, values map[string]string, lines map[string]bool, p *problems) {
	for _, name := range slices.Sorted(maps.Keys(e.files)) {
		path := e.files[name]
		if ours[name] != "" && !slices.Contains(e.ignored, name) {
			p.add(name, "is set, and so is %s_FILE; remove one of the two", name)
			continue
		}
		data, err := filekind.Read(path)
		if err != nil {
			p.add(name+"_FILE", "%w%s", err, readHint(err))
			continue
		}
		values[name] = p.bareContent(name+"_FILE", path, string(data), lines[name])
		if !lines[name] {
			p.hide(values[name])
		}
	}
}

// lending protects the environment of the process while it is lent to envconfig.
var lending sync.Mutex

// fill sets the fields of structs to values, or to their defaults. envconfig
// reads the environment of the process only. So the known variables are set there
// for the time of the call, and put back as they were.
func fill(values map[string]string, known []Variable, structs []any) error {
	lending.Lock()
	defer lending.Unlock()
	for _, v := range known {
		old, wasSet := os.LookupEnv(v.Name)
		value, isSet := values[v.Name]
		if wasSet == isSet && old == value {
			continue
		}
		defer putBack(v.Name, old, wasSet)
		putBack(v.Name, value, isSet)
	}
	var errs []error
	for _, s := range structs {
		// Process fails only on a value that it cannot convert, and all
		// fields are strings.
		errs = append(errs, envconfig.Process("", s))
	}
	return errors.Join(errs...)
}

// putBack sets a variable of the process, or removes it. Setenv fails only for
// NUL characters, which bare has removed.
func putBack(name, value string, isSet bool) {
	if isSet {
		_ = os.Setenv(name, value)
	} else {
		_ = os.Unsetenv(name)
	}
}

// warnings are about variables that have no effect.
func (e *environment) warnings() []string {
	var list []string
	for _, name := range e.ignored {
		list = append(list, name+" was set by Docker or Kubernetes for a service of that name, and is ignored")
	}
	return list
}

// injected recognises the variables that Docker's links and Kubernetes set in a
// container beside a service called derp, or derp-something.
func injected(name, value string, known bool) bool {
	for _, scheme := range []string{"tcp://", "udp://", "sctp://"} {
		if strings.HasPrefix(value, scheme) {
			return true
		}
	}
	return !known && injectedName().MatchString(name)
}

// injectedName is compiled at its first use, for a fast start: most environments have no
// unknown variable.
var injectedName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^DERP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?|ENV_\w+|NAME)$`)
})
