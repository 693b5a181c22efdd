package main

import (
	"os"
	"path/filepath"
	"testing"
)

// The documents are made from the structs of variables, and must not differ from
// them.
func TestDocs(t *testing.T) {
	root := filepath.Join("..", "..", "..", "..", "..")
	files, err := documents(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 3 {
		t.Errorf("%d documents, want 3", len(files))
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s differs from the code; run: make docs", name)
		}
	}
}

func TestReplaceTablesNeedsBothMarks(t *testing.T) {
	for name, templates := range tables {
		if _, err := replaceTables(tableBegin+tableEnd+providerTableBegin+tableEnd, templates); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, readme := range []string{"", tableBegin + tableEnd, providerTableBegin + tableEnd, tableBegin + providerTableBegin} {
			if text, err := replaceTables(readme, templates); err == nil {
				t.Errorf("%s: %q became %q", name, readme, text)
			}
		}
	}
}
