// Command makedocs writes the documentation of the variables: docker/env.example,
// and the tables in README.md and README.zh-CN.md. `make docs` runs it.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

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
	var example bytes.Buffer
	if err := config.WriteExample(&example); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "docker", "env.example"), example.Bytes(), 0o644); err != nil {
		return err
	}
	for language, name := range map[string]string{"en": "README.md", "zh": "README.zh-CN.md"} {
		path := filepath.Join(root, name)
		old, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text, err := config.ReplaceTables(string(old), language)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
