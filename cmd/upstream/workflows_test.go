package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// workflow is what the rules below need of a file in .github/workflows.
type workflow struct {
	On          yaml.Node
	Permissions *map[string]string
	Jobs        map[string]job
}

type job struct {
	Permissions *map[string]string
	Env         map[string]string
	Uses        yaml.Node
	Steps       []step
}

type step struct {
	ID   string
	Uses yaml.Node
	With map[string]string
	Env  map[string]string
	Run  string
}

// writes reports whether the job gets a token that may change anything.
func (j job) writes() bool {
	return j.Permissions == nil || slices.Contains(slices.Collect(maps.Values(*j.Permissions)), "write")
}

var (
	pinned = regexp.MustCompile(`^[\w.-]+/[\w./-]+@[0-9a-f]{40}$`)
	tagged = regexp.MustCompile(`^# v\d+\.\d+\.\d+$`)
	// The only code of the repository that jobs with rights compile or run.
	trusted = regexp.MustCompile(`(?m)^(cp \.github/merge "\$RUNNER_TEMP/merge"|` +
		`go build -modfile \.github/upstream\.mod -o "\$RUNNER_TEMP/upstream" \./cmd/upstream|` +
		`make dist VERSION="\$\{TAG#v\}"|\s*\.github/(publish|merge) "\$RUNNER_TEMP/upstream" .*)$`)
	code = regexp.MustCompile(`\b(go|make|bash|sh|source|docker (build|run|compose)|docker buildx) |\.github/|\.ci/|\./`)
)

// problems returns what breaks a rule of the supply chain.
func (w workflow) problems() []string {
	var found []string
	refuse := func(where, what string) { found = append(found, where+": "+what) }
	if w.Permissions == nil || len(*w.Permissions) > 0 {
		refuse("top", "permissions are not {}")
	}
	if on, _ := yaml.Marshal(&w.On); strings.Contains(string(on), "pull_request_target") || strings.Contains(string(on), "workflow_run") {
		refuse("top", "strangers start it with rights")
	}
	for name, j := range w.Jobs {
		if j.Permissions == nil {
			refuse(name, "no permissions of its own")
		}
		checkUses(j.Uses, func(what string) { refuse(name, what) })
		checkedOut, checked := false, false
		for _, s := range j.Steps {
			checkUses(s.Uses, func(what string) { refuse(name, what) })
			action, _, _ := strings.Cut(s.Uses.Value, "@")
			switch {
			case strings.Contains(s.Run, "${{"):
				refuse(name, "an expression in a script: "+s.Run)
			case action == "actions/setup-go" && s.With["cache"] != "false":
				refuse(name, "setup-go with a cache")
			case action == "actions/cache" || strings.HasPrefix(action, "actions/cache/"):
				refuse(name, "a cache")
			case action == "docker/setup-buildx-action" && s.With["cache-binary"] != "false":
				refuse(name, "a cache of buildx")
			case action == "docker/build-push-action" && (s.With["cache-from"] != "" || s.With["cache-to"] != ""):
				refuse(name, "a cache of images")
			case action == "actions/checkout" && (j.Permissions == nil || (*j.Permissions)["contents"] != "write") && s.With["persist-credentials"] != "false":
				refuse(name, "a token stays in .git")
			}
			checkedOut = checkedOut || action == "actions/checkout"
			if !j.writes() {
				continue
			}
			if rest := trusted.ReplaceAllString(s.Run, ""); code.MatchString(rest) {
				refuse(name, "code runs with rights: "+s.Run)
			}
			if action == "actions/download-artifact" && checkedOut {
				refuse(name, "an artifact is unpacked after the checkout")
			}
			check, apply := strings.Index(s.Run, `"$RUNNER_TEMP/upstream" check-patch `), strings.Index(s.Run, "git apply")
			if apply >= 0 && !checked && (check < 0 || check > apply) {
				refuse(name, "a patch is applied before it is checked")
			}
			checked = checked || check >= 0
			if checked && strings.Contains(s.Run, ".github/") {
				refuse(name, "a script of the patched tree runs")
			}
		}
	}
	return found
}

// checkUses refuses an action that its owner can change later.
func checkUses(uses yaml.Node, refuse func(string)) {
	switch {
	case uses.Value == "" || strings.HasPrefix(uses.Value, "./"):
	case !pinned.MatchString(uses.Value):
		refuse(uses.Value + " is not pinned by a commit")
	case !tagged.MatchString(uses.LineComment):
		refuse(uses.Value + " has no comment with its version")
	}
}

func workflows(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob(root + "/.github/workflows/*")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no workflows: %v", err)
	}
	texts := map[string]string{}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(path)] = string(text)
	}
	return texts
}

func parseWorkflow(t *testing.T, text string) workflow {
	t.Helper()
	var w workflow
	if err := yaml.Unmarshal([]byte(text), &w); err != nil {
		t.Fatal(err)
	}
	if len(w.Jobs) == 0 {
		t.Fatal("no jobs")
	}
	return w
}

func TestWorkflows(t *testing.T) {
	commits := map[string]string{}
	for name, text := range workflows(t) {
		w := parseWorkflow(t, text)
		for _, problem := range w.problems() {
			t.Errorf("%s: %s", name, problem)
		}
		// One commit of each action everywhere.
		for _, j := range w.Jobs {
			for _, s := range j.Steps {
				action, commit, _ := strings.Cut(s.Uses.Value, "@")
				if had, ok := commits[action]; ok && had != commit {
					t.Errorf("%s: %s at %s, elsewhere at %s", name, action, commit, had)
				}
				commits[action] = commit
			}
		}
	}
}

// The scripts that jobs with rights run call no other code of the repository.
func TestScriptsWithRights(t *testing.T) {
	comment := regexp.MustCompile(`(?m)^#.*$`)
	for _, name := range []string{"merge", "publish"} {
		if found := code.FindString(comment.ReplaceAllString(read(t, root+"/.github/"+name), "")); found != "" {
			t.Errorf(".github/%s has %q", name, found)
		}
	}
}

// Each rule finds what it is for.
func TestWorkflowRules(t *testing.T) {
	texts := workflows(t)
	for want, test := range map[string]struct{ file, old, replacement string }{
		"permissions are not {}":                     {"upstream.yml", "permissions: {}", "permissions: {contents: read}"},
		"no permissions of its own":                  {"test.yml", "    permissions:\n      contents: read\n", ""},
		"strangers start it with rights":             {"test.yml", "pull_request:", "pull_request_target:"},
		"actions/checkout@v6 is not pinned":          {"test.yml", "actions/checkout@d23441a48e516b6c34aea4fa41551a30e30af803", "actions/checkout@v6"},
		"has no comment with its version":            {"test.yml", " # v6.1.0", ""},
		"a cache of buildx":                          {"release.yml", "        with:\n          cache-binary: false\n", ""},
		"setup-go with a cache":                      {"release.yml", "          cache: false\n", ""},
		"a token stays in .git":                      {"test.yml", "persist-credentials: false", "persist-credentials: true"},
		"an expression in a script":                  {"test.yml", "run: .github/ci", "run: echo ${{ github.head_ref }}"},
		"code runs with rights: go run ./cmd/up":     {"upstream.yml", "go build -modfile .github/upstream.mod -o \"$RUNNER_TEMP/upstream\"", "go run"},
		"code runs with rights: go build -o":         {"rebuild.yml", "-modfile .github/upstream.mod ", ""},
		"code runs with rights: make test":           {"release.yml", "make dist VERSION=\"${TAG#v}\"", "make test"},
		"a patch is applied before it is checked":    {"upstream.yml", "\"$RUNNER_TEMP/upstream\" check-patch", "echo"},
		"a script of the patched tree runs":          {"upstream.yml", "\"$RUNNER_TEMP/merge\" \"$RUNNER_TEMP/upstream\" \"$VERSION\"", ".github/merge \"$RUNNER_TEMP/upstream\" \"$VERSION\""},
		"an artifact is unpacked after the checkout": {"upstream.yml", "      # The tests of new code", "      - uses: actions/download-artifact@634f93cb2916e3fdff6788551b99b062d0335ce0 # v5.0.0\n      # The tests of new code"},
		"a cache of images":                          {"release.yml", "          sbom: true", "          cache-from: type=gha\n          sbom: true"},
	} {
		t.Run(want, func(t *testing.T) {
			text := strings.Replace(texts[test.file], test.old, test.replacement, 1)
			if text == texts[test.file] {
				t.Fatalf("%s has no %q", test.file, test.old)
			}
			if found := strings.Join(parseWorkflow(t, text).problems(), "\n"); !strings.Contains(found, want) {
				t.Errorf("found %q", found)
			}
		})
	}
}

// The steps of the job that merges, with the patch of an attacker: nothing of the patch
// runs, and no file changes.
func TestMergeRefuses(t *testing.T) {
	var build, check string
	for _, s := range parseWorkflow(t, workflows(t)["upstream.yml"]).Jobs["merge"].Steps {
		switch {
		case strings.HasPrefix(s.Run, "go build"):
			build = s.Run
		case s.ID == "patch":
			check = s.Run
		}
	}
	temp, script := t.TempDir(), read(t, root+"/.github/merge")
	if out, err := bash(t, root, temp, build); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	dir := committed(t)
	for name, change := range map[string]func(){
		"script": func() {
			edit(t, dir+"/.github/merge", "set -euo pipefail\n", "set -euo pipefail\ntouch \"$RUNNER_TEMP/stolen\"\n")
		},
		"module": func() {
			edit(t, dir+"/go.mod", "\nrequire (", "\nreplace github.com/google/go-containerregistry => example.com/evil v1.0.0\n\nrequire (")
		},
		"": func() {},
	} {
		newTailscale(t, dir)
		change()
		put(t, temp+"/patch/upstream.patch", read(t, patchOf(t, dir)))
		out, err := bash(t, dir, temp, check)
		changed := gitIn(t, dir, "status", "--porcelain")
		if name == "" {
			want := " M CHANGELOG.md\n M README.md\n M README.zh-CN.md\n M go.mod\n M go.sum\n"
			if err != nil || changed != want {
				t.Errorf("ordinary: %v\n%s\nchanged %s", err, out, changed)
			}
			gitIn(t, dir, "reset", "--quiet", "--hard")
		} else if err == nil || changed != "" || !strings.Contains(out, "patch refused") {
			t.Errorf("%s: %v, changed %q\n%s", name, err, changed, out)
		}
	}
	if read(t, temp+"/merge") != script {
		t.Error("the script that merges is not that of the commit before")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// bash runs the script of a step as GitHub's runners do.
func bash(t *testing.T, dir, temp, script string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "RUNNER_TEMP="+temp, "GITHUB_OUTPUT="+filepath.Join(temp, "output"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}
