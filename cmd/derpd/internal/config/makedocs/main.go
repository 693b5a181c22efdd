// Command makedocs writes the documentation of the variables: docker/env.example,
// and the tables in README.md and README.zh-CN.md. `make docs` runs it.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"derpd/cmd/derpd/internal/config"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "makedocs:", err)
		os.Exit(1)
	}
}

// run writes the files below root, the repository.
func run(root string) error {
	files, err := documents(root)
	if err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// documents returns the new content of each file, by its name below root.
func documents(root string) (map[string]string, error) {
	var example bytes.Buffer
	if err := config.WriteExample(&example); err != nil {
		return nil, err
	}
	files := map[string]string{filepath.Join("docker", "env.example"): example.String()}
	for name, t := range tables {
		old, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		if files[name], err = replaceTables(string(old), t); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return files, nil
}

// The marks around the tables of a README.
const (
	tableBegin         = "<!-- made by: make docs -->\n"
	providerTableBegin = "<!-- made by: make docs, from certs/dns_*.go -->\n"
	tableEnd           = "<!-- end -->\n"
)

// tables are the templates of the two tables of each README, by the mark before
// the table.
var tables = map[string]map[string]*template.Template{
	"README.md": {
		tableBegin: parse(`| variable | default | meaning |
|---|---|---|
{{range .Variables}}| QQ{{.Name}}QQ | {{with .Default}}QQ{{.}}QQ{{else}}{{.Computed}}{{end}} | {{.Meaning}} |
{{end}}`),
		providerTableBegin: parse(`| provider | variable | default | meaning |
|---|---|---|---|
{{range .Providers}}{{$name := .Name}}{{range $i, $v := .Variables}}| {{if not $i}}QQ{{$name}}QQ{{end}} | QQ{{.Name}}QQ | {{with .Default}}QQ{{.}}QQ{{else}}{{if .Optional}}optional{{end}}{{end}} | {{.Meaning}} |
{{end}}{{end}}`),
	},
	"README.zh-CN.md": {
		tableBegin: parse(`| 变量 | 默认值 | 含义 |
|---|---|---|
{{range .Variables}}| QQ{{.Name}}QQ | {{with .Default}}QQ{{.}}QQ{{else}}{{.ZhComputed}}{{end}} | {{.ZhMeaning}} |
{{end}}`),
		providerTableBegin: parse(`| 服务商 | 变量 | 默认值 | 含义 |
|---|---|---|---|
{{range .Providers}}{{$name := .Name}}{{range $i, $v := .Variables}}| {{if not $i}}QQ{{$name}}QQ{{end}} | QQ{{.Name}}QQ | {{with .Default}}QQ{{.}}QQ{{else}}{{if .Optional}}可选{{end}}{{end}} | {{.ZhMeaning}} |
{{end}}{{end}}`),
	},
}

// parse returns a template, in which QQ stands for a backquote.
func parse(text string) *template.Template {
	return template.Must(template.New("").Parse(strings.ReplaceAll(text, "QQ", "`")))
}

// replaceTables returns a README with new tables.
func replaceTables(readme string, tables map[string]*template.Template) (string, error) {
	for begin, table := range tables {
		before, rest, found := strings.Cut(readme, begin)
		_, after, closed := strings.Cut(rest, tableEnd)
		if !found || !closed {
			return "", fmt.Errorf("no place for a table: want the lines %q and %q", begin, tableEnd)
		}
		var b strings.Builder
		if err := table.Execute(&b, config.Document()); err != nil {
			return "", err
		}
		readme = before + begin + b.String() + tableEnd + after
	}
	return readme, nil
}
