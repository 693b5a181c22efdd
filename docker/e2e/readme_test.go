//go:build e2e

package e2e

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The table of tests in each README names every scenario and no other.
func TestReadme(t *testing.T) {
	var want []string
	for _, s := range scenarios() {
		want = append(want, s.name)
	}
	slices.Sort(want)
	for file, heading := range map[string]string{"README.md": "\n## What is tested\n", "README.zh-CN.md": "\n## 测试了什么\n"} {
		text, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		_, section, _ := strings.Cut(string(text), heading)
		section, _, _ = strings.Cut(section, "\n## ")
		var got []string
		for line := range strings.Lines(section) {
			columns := strings.Split(line, "|")
			if len(columns) != 4 {
				continue
			}
			for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(columns[2], -1) {
				got = append(got, name[1])
			}
		}
		slices.Sort(got)
		if got = slices.Compact(got); !slices.Equal(got, want) {
			t.Errorf("%s names the scenarios\n%v, want\n%v", file, got, want)
		}
	}
}
