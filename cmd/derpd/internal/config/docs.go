package config

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"derpd/certs"
)

//go:generate go run ./makedocs ../../../..

// The templates over the variables: `derpd env`, docker/env.example, and the
// tables of README.md and README.zh-CN.md.
var (
	effectiveTemplate = template.Must(template.New("").Parse(
		`{{range .}}{{.Name}}={{.Shown}}  # {{.Source}}
{{end}}`))

	exampleTemplate = template.Must(template.New("").Parse(
		`# Copy this file to .env beside compose.yaml and uncomment what you need.
# Each variable can be given as a file: NAME_FILE=/run/secrets/name.
# Made by: derpd env --example
{{range .Variables}}
# {{.Meaning}}
{{with .Computed}}# default: {{.}}
{{end}}#{{.Name}}={{.Default}}
{{end}}{{range .Providers}}
# --- DERP_DNS_PROVIDER={{.Name}} ---
{{range .Variables}}# {{.Meaning}}{{if .Optional}} (optional){{end}}
#{{.Name}}={{.Default}}
{{end}}{{end}}`))

	tables = map[string]*template.Template{
		"en": template.Must(template.New("").Parse(`| variable | default | meaning |
|---|---|---|
{{range .Variables}}| ` + "`{{.Name}}`" + ` | {{with .Default}}` + "`{{.}}`" + `{{else}}{{.Computed}}{{end}} | {{.Meaning}} |
{{end}}`)),
		"zh": template.Must(template.New("").Parse(`| 变量 | 默认值 | 含义 |
|---|---|---|
{{range .Variables}}| ` + "`{{.Name}}`" + ` | {{with .Default}}` + "`{{.}}`" + `{{else}}{{.ZhComputed}}{{end}} | {{.ZhMeaning}} |
{{end}}`)),
	}

	providerTables = map[string]*template.Template{
		"en": template.Must(template.New("").Parse(`| provider | variable | default | meaning |
|---|---|---|---|
{{range .Providers}}{{$name := .Name}}{{range $i, $v := .Variables}}| {{if not $i}}` + "`{{$name}}`" + `{{end}} | ` + "`{{.Name}}`" + ` | {{with .Default}}` + "`{{.}}`" + `{{else}}{{if .Optional}}optional{{end}}{{end}} | {{.Meaning}} |
{{end}}{{end}}`)),
		"zh": template.Must(template.New("").Parse(`| 服务商 | 变量 | 默认值 | 含义 |
|---|---|---|---|
{{range .Providers}}{{$name := .Name}}{{range $i, $v := .Variables}}| {{if not $i}}` + "`{{$name}}`" + `{{end}} | ` + "`{{.Name}}`" + ` | {{with .Default}}` + "`{{.}}`" + `{{else}}{{if .Optional}}可选{{end}}{{end}} | {{.ZhMeaning}} |
{{end}}{{end}}`)),
	}
)

// documentation is what the templates of files print.
type documentation struct {
	Variables []variable
	Providers []providerDocs
}

type providerDocs struct {
	Name      string
	Variables []variable
}

func document() documentation {
	e := readEnvironment(nil, new(problems))
	d := documentation{Variables: e.documented()}
	for _, provider := range certs.DNSProviders() {
		d.Providers = append(d.Providers, providerDocs{provider.Name, variablesOf(e.providers[provider.Name])})
	}
	return d
}

// WriteExample writes docker/env.example, an environment file to fill in.
func WriteExample(w io.Writer) error { return exampleTemplate.Execute(w, document()) }

// The marks around the tables of a README.
const (
	tableBegin         = "<!-- made by: make docs -->\n"
	providerTableBegin = "<!-- made by: make docs, from certs/dns.go -->\n"
	tableEnd           = "<!-- end -->\n"
)

// ReplaceTables returns a README with new tables of the variables. The language
// is "en" or "zh".
func ReplaceTables(readme, language string) (string, error) {
	for begin, table := range map[string]*template.Template{tableBegin: tables[language], providerTableBegin: providerTables[language]} {
		before, rest, found := strings.Cut(readme, begin)
		_, after, closed := strings.Cut(rest, tableEnd)
		if !found || !closed {
			return "", fmt.Errorf("no place for a table: want the lines %q and %q", begin, tableEnd)
		}
		var b strings.Builder
		if err := table.Execute(&b, document()); err != nil {
			return "", err
		}
		readme = before + begin + b.String() + tableEnd + after
	}
	return readme, nil
}

// effective is one line of `derpd env`.
type effective struct {
	Name, Shown string
	Source      string // how the variable was given, or how its default is found
}

// WriteEffective writes every variable with its value, without secrets, and with
// the source of the value. Of DNS providers' variables it writes those that are
// set, and those of the chosen provider. It also works for a configuration with
// problems; computed defaults are then empty.
func (c *Config) WriteEffective(w io.Writer) error {
	e := c.environment
	list := e.documented()
	for _, provider := range certs.DNSProviders() {
		for _, v := range variablesOf(e.providers[provider.Name]) {
			if e.given[v.Name] || provider.Name == e.Provider {
				list = append(list, v)
			}
		}
	}
	var lines []effective
	for _, v := range list {
		line := effective{v.Name, v.Shown(), "default"}
		switch {
		case e.files[v.Name] != "":
			line.Source = "from " + e.files[v.Name]
		case e.given[v.Name]:
			line.Source = "set"
		case slices.Contains(e.assumed, v.Name):
			line.Source = e.platform.name
		}
		if line.Shown == "" && v.Computed() != "" {
			line.Source += ": " + v.Computed()
			line.Shown = c.computed[v.Name]
		}
		lines = append(lines, line)
	}
	return effectiveTemplate.Execute(w, lines)
}

// computedDefaults are the values of variables whose default is not one value,
// except those that only a running relay knows.
func (c *Config) computedDefaults() map[string]string {
	values := map[string]string{
		"DERP_HTTP_PORT": strconv.Itoa(cmp.Or(PortOf(c.Listen.HTTP), -1)),
		"DERP_CERT_DIR":  c.Storage.CertDir,
		"DERP_CERT_MODE": c.Certificate.Mode,
		"DERP_NODE_NAME": c.Region.Node.Name,
	}
	switch c.Certificate.Mode {
	case ModeManual:
		values["DERP_CERT_FILE"], values["DERP_KEY_FILE"] = c.Certificate.Manual.CertFile, c.Certificate.Manual.KeyFile
	case ModeLetsEncrypt:
		values["DERP_ACME_CA"] = defaultAuthority
		values["DERP_ACME_CHALLENGES"] = c.environment.challenges()
	}
	return values
}
