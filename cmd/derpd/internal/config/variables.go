package config

import (
	"reflect"
	"slices"
	"strconv"
	"strings"

	"derpd/certs"
	"derpd/internal/redact"
)

// Variable is one field of a struct of variables.
type Variable struct {
	Name  string
	Value string // as given, else the default; empty before fill

	tags reflect.StructTag
}

// variablesOf lists the fields of a struct of variables, given as a pointer, in
// the order in which envconfig sees them. envconfig's own list is only for
// text/template, which makes the program a third larger: it keeps every exported
// method of every type. A test compares both lists.
func variablesOf(structure any) []Variable {
	var list []Variable
	v := reflect.ValueOf(structure).Elem()
	for _, field := range reflect.VisibleFields(v.Type()) {
		if !field.Anonymous {
			list = append(list, Variable{field.Tag.Get("envconfig"), v.FieldByIndex(field.Index).String(), field.Tag})
		}
	}
	return list
}

// documented lists the variables in the order of the documentation, but those of
// DNS providers. The sources of admission stand before what they share.
func (e *environment) documented() []Variable {
	list := variablesOf(&e.Env)
	shared := variablesOf(&e.AdmissionEnv)[0].Name
	var sources []Variable
	for _, source := range e.sources {
		sources = append(sources, variablesOf(source)...)
	}
	at := slices.IndexFunc(list, func(v Variable) bool { return v.Name == shared })
	return slices.Insert(list, at, sources...)
}

// variables lists all variables, those of DNS providers last.
func (e *environment) variables() []Variable {
	list := e.documented()
	for _, provider := range certs.DNSProviders() {
		list = append(list, variablesOf(e.providers[provider.Name])...)
	}
	return list
}

// Changed returns the variables whose values differ in another configuration. Lists of
// node keys are left out: a running relay reads them again by itself.
func (c *Config) Changed(other *Config) []string {
	var names []string
	before, after := c.environment.variables(), other.environment.variables()
	for i, v := range before {
		if v.Value != after[i].Value && v.tag("lines") != "true" {
			names = append(names, v.Name)
		}
	}
	return names
}

func (v Variable) tag(name string) string { return v.tags.Get(name) }

// Default is the value when the variable is not set.
func (v Variable) Default() string { return v.tag("default") }

// Secret reports whether the value is never shown.
func (v Variable) Secret() bool { return v.tag("secret") == "true" }

// Optional reports whether a DNS provider works without the variable.
func (v Variable) Optional() bool { return v.tag("optional") == "true" || v.Default() != "" }

// Meaning is the meaning in English.
func (v Variable) Meaning() string {
	return strings.ReplaceAll(v.tag("desc"), "{providers}", either(providerNames()))
}

// ZhMeaning is the meaning in Chinese.
func (v Variable) ZhMeaning() string {
	names := strings.NewReplacer(", ", "、", " or ", " 或 ").Replace(either(providerNames()))
	return strings.ReplaceAll(v.tag("zh"), "{providers}", names)
}

// Computed is how the default is found, where it is not one value.
func (v Variable) Computed() string { return v.tag("or") }

// ZhComputed is Computed in Chinese.
func (v Variable) ZhComputed() string { return v.tag("zhor") }

// Shown is the value without secrets. A private node key and a key of Tailscale's
// API are hidden even in a variable that is not for secrets.
func (v Variable) Shown() string {
	switch {
	case v.Value == "":
		return ""
	case v.Secret(), strings.Contains(v.Value, "privkey:"), strings.Contains(v.Value, "tskey-"):
		return "(secret)"
	case v.tag("secret") != "url" && redact.Secrets(v.Value) != v.Value:
		return "(secret)"
	case strings.ContainsAny(v.Value, "\r\n"):
		return strconv.Quote(v.Value)
	case v.tag("secret") == "url":
		targets := splitList(v.Value)
		for i, target := range targets {
			targets[i] = redact.URL(target)
		}
		return strings.Join(targets, ",")
	}
	return v.Value
}
