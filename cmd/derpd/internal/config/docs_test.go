package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"text/template"

	"github.com/kelseyhightower/envconfig"

	"derpd/certs"
)

const repository = "../../../.."

// The variables are those that envconfig itself lists, in its order.
func TestVariablesAreThoseOfEnvconfig(t *testing.T) {
	list := template.Must(template.New("").Parse(`{{range .}}{{.Key}} {{.Field.String}} {{.Tags}}{{"\n"}}{{end}}`))
	for _, structure := range readEnvironment(nil, new(problems)).structs() {
		var want, got strings.Builder
		if err := envconfig.Usaget("", structure, &want, list); err != nil {
			t.Fatal(err)
		}
		for _, v := range variablesOf(structure) {
			fmt.Fprintf(&got, "%s %s %s\n", v.Name, v.Value, v.tags)
		}
		if got.String() != want.String() {
			t.Errorf("%T: derpd lists\n%s\nenvconfig lists\n%s", structure, got.String(), want.String())
		}
	}
}

// Every field of every struct of variables is a string that the operator can set,
// and is documented in both languages.
func TestEveryVariableIsDocumented(t *testing.T) {
	e := readEnvironment(nil, new(problems))
	seen := make(map[string]bool)
	for _, structure := range e.structs() {
		for _, v := range variablesOf(structure) {
			if seen[v.Name] || !strings.HasPrefix(v.Name, "DERP_") || v.tag("envconfig") != v.Name {
				t.Errorf("%s: twice, or not in full: %q", v.Name, v.tags)
			}
			seen[v.Name] = true
			if v.Meaning() == "" || v.ZhMeaning() == "" || (v.Computed() == "") != (v.ZhComputed() == "") || v.Computed() != "" && v.Default() != "" {
				t.Errorf("%s: %q", v.Name, v.tags)
			}
			if text := v.Meaning() + v.ZhMeaning(); strings.Contains(text, "{") || strings.Contains(text, "|") {
				t.Errorf("%s: a placeholder, or the end of a cell, in %q", v.Name, text)
			}
			// These make envconfig stop at the first problem, or not see the field.
			for _, tag := range []string{"required", "ignored", "split_words"} {
				if v.tag(tag) != "" {
					t.Errorf("%s has the tag %s", v.Name, tag)
				}
			}
			if is := v.tag("is"); is != "" && rules[is].valid == nil {
				t.Errorf("%s: no rule %q", v.Name, is)
			}
		}
		fields := 0
		countStrings(t, reflect.ValueOf(structure).Elem(), &fields)
		if got := len(variablesOf(structure)); got != fields {
			t.Errorf("%T: envconfig sees %d of %d fields", structure, got, fields)
		}
	}
	if len(seen) < 90 {
		t.Errorf("only %d variables", len(seen))
	}
}

func countStrings(t *testing.T, v reflect.Value, fields *int) {
	t.Helper()
	for i := range v.NumField() {
		switch field := v.Field(i); field.Kind() {
		case reflect.Struct:
			countStrings(t, field, fields)
		case reflect.String:
			*fields++
		default:
			t.Errorf("%s is no string", v.Type().Field(i).Name)
		}
	}
}

func TestEveryProviderIsDocumented(t *testing.T) {
	e := readEnvironment(nil, new(problems))
	for _, v := range variablesOf(&e.DNSEnv) {
		if v.Name != "DERP_DNS_PROVIDER" {
			continue
		}
		for _, provider := range certs.DNSProviders() {
			if !strings.Contains(v.Meaning(), provider.Name) || !strings.Contains(v.ZhMeaning(), provider.Name) {
				t.Errorf("%s is not in %q and %q", provider.Name, v.Meaning(), v.ZhMeaning())
			}
		}
	}
}

// The settings that the READMEs show are a valid configuration.
func TestDocumentedSettings(t *testing.T) {
	// A value that every variable accepts.
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("nodekey:"+key64), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"README.md", "README.zh-CN.md"} {
		data, err := os.ReadFile(filepath.Join(repository, path))
		if err != nil {
			t.Fatal(err)
		}
		blocks := strings.Split(string(data), "```sh\n")[1:]
		found := 0
		for _, block := range blocks {
			block, _, _ = strings.Cut(block, "```")
			if !strings.HasPrefix(block, "DERP_") {
				continue
			}
			found++
			env := []string{"DERP_DATA_DIR=" + t.TempDir()}
			for line := range strings.Lines(block) {
				line = strings.TrimSpace(line)
				if name, value, isSetting := strings.Cut(line, "="); isSetting && !strings.HasPrefix(line, "#") {
					if strings.HasPrefix(value, "/run/secrets/") {
						value = secret
					}
					env = append(env, name+"="+value)
				}
			}
			if _, err := Load(env); err != nil {
				t.Errorf("%s: %v in\n%s", path, err, block)
			}
		}
		if found == 0 {
			t.Errorf("%s: no settings found", path)
		}
	}
}
