package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// messagesOfOthers are in the table of faults, but are not printed by this code.
var messagesOfOthers = []string{
	"services.relay.env_file.0 must be a string",           // Compose
	"address already in use",                               // the kernel
	"cert hash does not match",                             // Tailscale
	"tailscale debug derp",                                 // Tailscale
	"none:443",                                             // Tailscale
	"tls: first record does not look like a TLS handshake", // Go
	"MappingVariesByDestIP: true",                          // Tailscale
}

// The table of faults in each README quotes messages as this code prints them.
func TestReadmeQuotesMessages(t *testing.T) {
	source := sourceText(t)
	english := quotedMessages(t, "README.md", "\n## When something is wrong\n")
	chinese := quotedMessages(t, "README.zh-CN.md", "\n## 出了问题\n")
	if len(english) < 10 || !slices.Equal(english, chinese) {
		t.Errorf("README.md quotes\n%q, README.zh-CN.md\n%q", english, chinese)
	}
	for _, message := range english {
		if slices.Contains(messagesOfOthers, message) {
			continue
		}
		// The source has no text for … and for numbers. A colon or a semicolon
		// joins messages of several functions.
		for _, part := range regexp.MustCompile(`…|[:;]| \d+`).Split(message, -1) {
			if part = strings.TrimSpace(part); !strings.Contains(source, part) && !slices.Contains(messagesOfOthers, part) {
				t.Errorf("the READMEs quote %q, but no code has %q", message, part)
			}
		}
	}
}

// quotedMessages returns the code in the first column of the table below heading.
func quotedMessages(t *testing.T, name, heading string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), heading)
	section, _, _ = strings.Cut(section, "\n## ")
	var list []string
	for line := range strings.Lines(section) {
		columns := strings.Split(line, "|")
		if len(columns) != 4 {
			continue
		}
		for _, code := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(columns[1], -1) {
			list = append(list, code[1])
		}
	}
	return list
}

// sourceText is the text of all Go files of the product, without tests.
func sourceText(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range []string{".", "../../relay", "../../certs", "../../healthz", "../../internal"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			b.Write(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}
