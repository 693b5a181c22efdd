package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"derpd/internal/release"
)

// releaseName matches the name of a release, such as 1.104.5-2.
var releaseName = release.Name

// history is the changelog, newest section first.
type history struct {
	head     string
	sections []section
}

// section is one heading of the changelog and the text below.
type section struct{ name, body string }

// unreleased is the heading of changes that no release has yet.
const unreleased = "Unreleased"

func parseHistory(text string) *history {
	parts := strings.Split("\n"+text, "\n## ")
	h := &history{head: strings.TrimPrefix(parts[0], "\n")}
	for _, part := range parts[1:] {
		name, body, _ := strings.Cut(part, "\n")
		h.sections = append(h.sections, section{name, strings.TrimSpace(body)})
	}
	return h
}

func (h *history) String() string {
	var b strings.Builder
	b.WriteString(strings.TrimRight(h.head, "\n") + "\n")
	for _, s := range h.sections {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n", s.name, s.body)
	}
	return b.String()
}

// close adds lines to the unreleased section, and names the section after the next
// release on this version of Tailscale. It returns the name.
func (h *history) close(tailscaleVersion string, lines []string) (string, error) {
	on := strings.TrimPrefix(tailscaleVersion, "v")
	last := 0
	for _, s := range h.sections {
		if rest, ok := strings.CutPrefix(s.name, on+"-"); ok && releaseName.MatchString(s.name) {
			n, err := strconv.Atoi(rest)
			if err != nil {
				return "", fmt.Errorf("%s: %w", changelog, err)
			}
			last = max(last, n)
		}
	}
	release := fmt.Sprintf("%s-%d", on, last+1)
	if !releaseName.MatchString(release) {
		return "", fmt.Errorf("go.mod requires %s %s, which is not a release", tailscale, tailscaleVersion)
	}
	if len(h.sections) == 0 || h.sections[0].name != unreleased {
		h.sections = append([]section{{}}, h.sections...)
	}
	first := &h.sections[0]
	first.name = release
	for _, line := range lines {
		// A line after a list continues the list.
		gap := "\n\n"
		if last := first.body[strings.LastIndex(first.body, "\n")+1:]; first.body == "" {
			gap = ""
		} else if strings.HasPrefix(last, "- ") || strings.HasPrefix(last, "  ") {
			gap = "\n"
		}
		first.body += gap + "- " + line
	}
	if first.body == "" {
		return "", errors.New("nothing to release: the changelog has nothing unreleased")
	}
	return release, nil
}

// closeRelease turns the unreleased section of the changelog into a release.
func closeRelease(ctx context.Context, tool goTool, lines []string, stdout io.Writer) (outputs, error) {
	m, err := readModule(ctx, tool)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(changelog)
	if err != nil {
		return nil, err
	}
	h := parseHistory(string(text))
	release, err := h.close(m.requires[tailscale], lines)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(changelog, []byte(h.String()), 0o644); err != nil {
		return nil, err
	}
	var out outputs
	out.set("version", release)
	_, err = fmt.Fprintln(stdout, release)
	return out, err
}

// printNotes prints the changelog's section of a release.
func printNotes(release string, stdout io.Writer) error {
	text, err := os.ReadFile(changelog)
	if err != nil {
		return err
	}
	for _, s := range parseHistory(string(text)).sections {
		if s.name == release {
			_, err := fmt.Fprintln(stdout, s.body)
			return err
		}
	}
	return fmt.Errorf("%s has no section %q", changelog, "## "+release)
}

// tagsOf returns the tags of a release: one that never moves, and the moving ones
// (1.104.5, 1.104, 1, latest), so that people choose how closely they follow.
func tagsOf(release string) ([]string, error) {
	numbers := releaseName.FindStringSubmatch(release)
	if numbers == nil {
		return nil, fmt.Errorf("%q is not the name of a release; use one such as 1.104.5-1", release)
	}
	major, minor, patch := numbers[1], numbers[1]+"."+numbers[2], numbers[1]+"."+numbers[2]+"."+numbers[3]
	return []string{release, patch, minor, major, "latest"}, nil
}

// printTags prints the names under which the images of a release are published.
func printTags(ctx context.Context, tool goTool, release string, images []string, stdout io.Writer) (outputs, error) {
	releaseTags, err := tagsOf(release)
	if err != nil {
		return nil, usageError{err}
	}
	patch := releaseTags[1]
	m, err := readModule(ctx, tool)
	if err != nil {
		return nil, err
	}
	// An image must not be named after a Tailscale release that is not in it.
	if m.requires[tailscale] != "v"+patch {
		return nil, fmt.Errorf("release %s must be built on %s v%s, but go.mod requires %s", release, tailscale, patch, m.requires[tailscale])
	}
	var names, tags []string
	for _, image := range images {
		if image == "" {
			continue
		}
		// Owners on GitHub may have capitals, which registries refuse.
		image = strings.ToLower(image)
		names = append(names, image)
		for _, tag := range releaseTags {
			tags = append(tags, image+":"+tag)
		}
	}
	var out outputs
	out.set("version", release)
	out.set("go", m.goVersion)
	out.set("images", strings.Join(names, " "))
	out.set("tags", strings.Join(tags, ","))
	_, err = fmt.Fprintln(stdout, strings.Join(tags, "\n"))
	return out, err
}
