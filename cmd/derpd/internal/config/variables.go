package config

import (
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/kelseyhightower/envconfig"

	"derpd/certs"
	"derpd/relay/admit"
)

// variable is one field of a struct of variables.
type variable struct {
	Name  string
	Value string // as given, else the default; empty before fill

	tags reflect.StructTag
}

// fieldsTemplate prints name, value and tags of each field. NUL, which no value
// has, ends each of the three.
var fieldsTemplate = template.Must(template.New("").Parse("{{range .}}{{.Key}}\x00{{.Field.String}}\x00{{.Tags}}\x00{{end}}"))

// variablesOf lists the fields of a struct of variables, given as a pointer, as
// envconfig sees them.
func variablesOf(structure any) []variable {
	var b strings.Builder
	// The template is constant, and the structs are our own.
	if err := envconfig.Usaget("", structure, &b, fieldsTemplate); err != nil {
		panic(err)
	}
	var list []variable
	for fields := range slices.Chunk(strings.Split(strings.TrimSuffix(b.String(), "\x00"), "\x00"), 3) {
		list = append(list, variable{fields[0], fields[1], reflect.StructTag(fields[2])})
	}
	return list
}

// documented lists the variables in the order of the documentation, but those of
// DNS providers. The sources of admission stand before what they share.
func (e *environment) documented() []variable {
	list := variablesOf(&e.Env)
	shared := variablesOf(&e.AdmissionEnv)[0].Name
	var sources []variable
	for _, source := range e.sources {
		sources = append(sources, variablesOf(source)...)
	}
	at := slices.IndexFunc(list, func(v variable) bool { return v.Name == shared })
	return slices.Insert(list, at, sources...)
}

// variables lists all variables, those of DNS providers last.
func (e *environment) variables() []variable {
	list := e.documented()
	for _, provider := range certs.DNSProviders() {
		list = append(list, variablesOf(e.providers[provider.Name])...)
	}
	return list
}

func (v variable) tag(name string) string { return v.tags.Get(name) }

// Default is the value when the variable is not set.
func (v variable) Default() string { return v.tag("default") }

// Secret reports whether the value is never shown.
func (v variable) Secret() bool { return v.tag("secret") == "true" }

// Optional reports whether a DNS provider works without the variable.
func (v variable) Optional() bool { return v.tag("optional") == "true" || v.Default() != "" }

// Meaning is the meaning in English.
func (v variable) Meaning() string {
	return strings.ReplaceAll(v.tag("desc"), "{providers}", either(providerNames()))
}

// ZhMeaning is the meaning in Chinese.
func (v variable) ZhMeaning() string {
	names := strings.NewReplacer(", ", "、", " or ", " 或 ").Replace(either(providerNames()))
	return strings.ReplaceAll(v.tag("zh"), "{providers}", names)
}

// Computed is how the default is found, where it is not one value.
func (v variable) Computed() string { return v.tag("or") }

// ZhComputed is Computed in Chinese.
func (v variable) ZhComputed() string { return v.tag("zhor") }

// Shown is the value without secrets. A private node key is hidden even in a
// variable that is not for secrets.
func (v variable) Shown() string {
	switch {
	case v.Value == "":
		return ""
	case v.Secret(), strings.Contains(v.Value, "privkey:"):
		return "(secret)"
	case strings.ContainsAny(v.Value, "\r\n"):
		return strconv.Quote(v.Value)
	case v.tag("secret") == "url":
		targets := splitList(v.Value)
		for i, target := range targets {
			targets[i] = admit.RedactURL(target)
		}
		return strings.Join(targets, ",")
	}
	return v.Value
}
