package main

import (
	goparser "go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
