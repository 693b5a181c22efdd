package config

import (
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/template"

	"github.com/kelseyhightower/envconfig"

	"derpd/certs"
)

// variable is one field of a struct of variables.
type variable struct {
	Name  string
	Value string // as given, else the default; empty before fill

	tags reflect.StructTag
}

// variablesOf lists the fields of a struct of variables, given as a pointer, as
// envconfig sees them.
func variablesOf(structure any) []variable {
	var list []variable
	add := func(name string, value reflect.Value, tags reflect.StructTag) string {
		list = append(list, variable{name, value.String(), tags})
		return ""
	}
	each := template.Must(eachField().Clone()).Funcs(template.FuncMap{"add": add})
	// The template is constant, and the structs are our own.
	if err := envconfig.Usaget("", structure, io.Discard, each); err != nil {
		panic(err)
	}
	return list
}

var eachField = sync.OnceValue(func() *template.Template {
	none := func(string, reflect.Value, reflect.StructTag) string { return "" }
	return template.Must(template.New("each").Funcs(template.FuncMap{"add": none}).Parse("{{range .}}{{add .Key .Field .Tags}}{{end}}"))
})

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

// providerVariables lists the variables of all DNS providers.
func (e *environment) providerVariables() []variable {
	var list []variable
	for _, provider := range certs.DNSProviders() {
		list = append(list, variablesOf(e.providers[provider.Name])...)
	}
	return list
}

// variables lists all variables.
func (e *environment) variables() []variable { return append(e.documented(), e.providerVariables()...) }

// order is the position of each variable in the documentation.
func (e *environment) order() map[string]int {
	order := make(map[string]int)
	for i, v := range e.variables() {
		order[v.Name] = i
	}
	return order
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
			targets[i] = redactURL(target)
		}
		return strings.Join(targets, ",")
	}
	return v.Value
}
