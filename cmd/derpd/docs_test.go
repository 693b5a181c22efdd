package main

import (
	"flag"
	goparser "go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated parts of the documentation")

const (
	tableBegin         = "<!-- made by: make docs -->\n"
	providerTableBegin = "<!-- made by: make docs, from certs/dns.go -->\n"
	tableEnd           = "<!-- end -->\n"
)

// The documentation of the variables is made from their struct, and must not
// differ from it. `make docs` writes it.
func TestDocs(t *testing.T) {
	root := filepath.Join("..", "..")
	for path, make := range map[string]func(old string) string{
		"docker/env.example": func(string) string { return exampleFile() },
		"README.md":          func(old string) string { return withTables(t, old, "en") },
		"README.zh-CN.md":    func(old string) string { return withTables(t, old, "zh") },
	} {
		path = filepath.Join(root, path)
		old, err := os.ReadFile(path)
		if err != nil && !*update {
			t.Fatal(err)
		}
		want := make(string(old))
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		} else if want != string(old) {
			t.Errorf("%s is not what the code says; run: make docs", path)
		}
	}
}

func withTables(t *testing.T, old, language string) string {
	t.Helper()
	for begin, table := range map[string]string{tableBegin: table(language), providerTableBegin: providerTable(language)} {
		before, rest, found := strings.Cut(old, begin)
		_, after, closed := strings.Cut(rest, tableEnd)
		if !found || !closed {
			t.Fatalf("no place for the table: want the lines %q and %q", begin, tableEnd)
		}
		old = before + begin + table + tableEnd + after
	}
	return old
}

func TestEveryVariableIsDocumentedInBothLanguages(t *testing.T) {
	for _, v := range (environment{}).variables() {
		if v.en == "" || v.zh == "" || (v.computed == "") != (v.zhHow == "") {
			t.Errorf("%s: en %q, zh %q, computed default %q, %q", v.name, v.en, v.zh, v.computed, v.zhHow)
		}
	}
}

func TestEveryProviderIsDocumentedInBothLanguages(t *testing.T) {
	for _, v := range (environment{}).variables() {
		if v.name != "DERP_DNS_PROVIDER" {
			continue
		}
		if !strings.Contains(v.en, providerNames()) {
			t.Errorf("en: %s; want %s", v.en, providerNames())
		}
		if list := strings.NewReplacer(", ", "、", " or ", " 或 ").Replace(providerNames()); !strings.Contains(v.zh, list) {
			t.Errorf("zh: %s; want %s", v.zh, list)
		}
	}
	for _, v := range credentialVariables() {
		if v.en == "" || v.zh == "" || v.required && v.fallback != "" {
			t.Errorf("%s: en %q, zh %q, required %t, default %q", v.name, v.en, v.zh, v.required, v.fallback)
		}
	}
}

// What the READMEs tell people to put into .env is a valid configuration.
func TestDocumentedSettings(t *testing.T) {
	// One that every variable takes.
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("nodekey:"+key64), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"README.md", "README.zh-CN.md"} {
		blocks := strings.Split(contents(t, path), "```sh\n")[1:]
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
			if _, err := loadConfig(env); err != nil {
				t.Errorf("%s: %v in\n%s", path, err, block)
			}
		}
		if found == 0 {
			t.Errorf("%s: no settings found", path)
		}
	}
}

// The direction of imports is the architecture: cmd knows the parts, the parts
// do not know each other.
func TestImports(t *testing.T) {
	forbidden := map[string]map[string]string{
		"relay": {
			"derpd/certs":   "the relay takes certificates as a func",
			"derpd/healthz": "health looks at the relay, not the other way round",
			"derpd/cmd":     "libraries do not know the program",
		},
		"certs": {
			"derpd/relay":   "certificates do not know what they are for",
			"derpd/healthz": "health looks at certificates, not the other way round",
			"derpd/cmd":     "libraries do not know the program",
		},
		"healthz": {
			"derpd/relay": "health sees the relay as a client does",
			"derpd/certs": "health is told about certificates by a func",
			"derpd/cmd":   "libraries do not know the program",
		},
	}
	for pkg, edges := range forbidden {
		root := filepath.Join("..", "..", pkg)
		files := 0
		err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") {
				return err
			}
			files++
			parsed, err := goparser.ParseFile(token.NewFileSet(), path, nil, goparser.ImportsOnly)
			if err != nil {
				return err
			}
			for _, spec := range parsed.Imports {
				name := strings.Trim(spec.Path.Value, `"`)
				for edge, why := range edges {
					if name == edge || strings.HasPrefix(name, edge+"/") {
						t.Errorf("%s imports %s, but %s", path, name, why)
					}
				}
				if name == "log" && !strings.HasSuffix(path, "_test.go") && !strings.Contains(path, "acmetest") {
					t.Errorf("%s imports log, but libraries log through what they are given", path)
				}
			}
			return nil
		})
		if err != nil || files == 0 {
			t.Fatalf("%s: %d files, %v", root, files, err)
		}
	}
}
