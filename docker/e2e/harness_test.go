//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// prefix begins the name of everything that the tests create in Docker. The PID
// follows, so that two runs do not interfere.
const prefix = "derpd-e2e-"

// ownerLabel is the label by which docker compose finds the parts of a project.
const ownerLabel = "com.docker.compose.project"

// brokenVariable makes TestScenarios run a table that is broken on purpose.
const brokenVariable = "E2E_BROKEN"

// docking guards what is created in Docker. Creating holds it for reading. Holding
// it for writing means that everything is visible and nothing is added.
var docking sync.RWMutex

// interrupted ends when the run gets a signal to stop.
var interrupted, interrupt = context.WithCancel(context.Background())

func TestMain(m *testing.M) {
	// All files of the run are in one directory, which is removed at the end.
	files := filepath.Join(os.TempDir(), prefix+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(files, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = os.Setenv("TMPDIR", files) // fails only for invalid names
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // a second one kills
		interrupt()
		docking.Lock()
		rows.print(os.Stdout)
		sweep(os.Getpid())
		_ = os.RemoveAll(files)
		os.Exit(130)
	}()
	sweep(0)
	code := m.Run()
	sweep(os.Getpid())
	_ = os.RemoveAll(files)
	rows.print(os.Stdout)
	os.Exit(code)
}

// project returns the name of the test's compose project.
func project(t *testing.T) string {
	name := strings.TrimPrefix(strings.ToLower(t.Name()), "testscenarios/")
	return prefix + strconv.Itoa(os.Getpid()) + "-" + strings.NewReplacer("/", "-", "_", "-").Replace(name)
}

// sweep removes everything that the process with this PID created in Docker. PID 0
// means all processes that have ended, for example by a kill.
func sweep(pid int) {
	ours := func(name string) bool {
		// The names of images begin with the address of a registry.
		rest, ok := strings.CutPrefix(path.Base(name), prefix)
		number, _, _ := strings.Cut(rest, "-")
		owner, err := strconv.Atoi(number)
		if !ok || err != nil {
			return false
		}
		return owner == pid || pid == 0 && errors.Is(syscall.Kill(owner, 0), syscall.ESRCH)
	}
	// An image that was pulled has a name by digest after its tag is removed.
	const named = `{{.Repository}}{{if eq .Tag "<none>"}}@{{.Digest}}{{else}}:{{.Tag}}{{end}} {{.Repository}}`
	const labelled = `{{.ID}} {{.Label "` + ownerLabel + `"}}`
	for _, kind := range []struct{ list, remove []string }{
		{[]string{"ps", "--all", "--format", labelled}, []string{"rm", "--force", "--volumes"}},
		{[]string{"network", "ls", "--format", labelled}, []string{"network", "rm"}},
		{[]string{"volume", "ls", "--format", `{{.Name}} {{.Label "` + ownerLabel + `"}}`}, []string{"volume", "rm", "--force"}},
		{[]string{"image", "ls", "--digests", "--format", named}, []string{"image", "rm", "--force"}},
	} {
		out, err := runEngine(context.Background(), dockerTimeout, kind.list...)
		if err != nil {
			fmt.Fprintf(os.Stderr, "cleaning up: docker %v: %v\n%s", kind.list, err, out)
			continue
		}
		for line := range strings.Lines(out) {
			fields := strings.Fields(line)
			if len(fields) != 2 || !ours(fields[1]) {
				continue
			}
			if out, err := runEngine(context.Background(), dockerTimeout, append(kind.remove, fields[0])...); err != nil {
				fmt.Fprintf(os.Stderr, "cleaning up: docker %v %s: %v\n%s", kind.remove, fields[0], err, out)
			}
		}
	}
}

// brokenScenarios has a row for each way to fail, and rows that pass.
func brokenScenarios() []scenario {
	return []scenario{
		{"fine", beside, func(_ *testing.T, r *row) { r.saw("as it should be") }},
		{"broken", alone, func(t *testing.T, r *row) {
			r.saw("so far so good")
			t.Fatal("broken on purpose")
		}},
		{"panics", beside, func(*testing.T, *row) { panic("on purpose") }},
		{"broken-when-cleaning", beside, func(t *testing.T, _ *row) {
			t.Cleanup(func() { t.Error("broken on purpose") })
		}},
		{"missing", beside, func(t *testing.T, _ *row) { t.Skip("not here") }},
		{"long", long, func(t *testing.T, _ *row) { t.Error("ran in spite of -short") }},
		{"last", beside, func(_ *testing.T, r *row) { r.saw("reached") }},
	}
}

// TestHarness runs a table with failing rows in another process. Every row must run
// and be printed, and one failing row must fail the whole run.
func TestHarness(t *testing.T) {
	for _, test := range []struct {
		filter string
		code   int
		want   []string
	}{
		{"TestScenarios", 1, []string{
			"fine passed as it should be", "broken FAILED so far so good", "panics FAILED", "broken-when-cleaning FAILED",
			"missing skipped", "last passed reached", "6 scenarios, 3 failed",
		}},
		{"TestScenarios/^broken$", 1, []string{"broken FAILED so far so good", "1 scenarios, 1 failed"}},
		{"TestScenarios/^fine$", 0, []string{"fine passed as it should be", "1 scenarios, 0 failed"}},
	} {
		t.Run(test.filter, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0], "-test.short", "-test.run="+test.filter)
			cmd.Env = append(os.Environ(), brokenVariable+"=1")
			out, err := cmd.Output()
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if code := cmd.ProcessState.ExitCode(); code != test.code {
				t.Errorf("exit status %d, want %d", code, test.code)
			}
			_, printed, found := strings.Cut(string(out), "SCENARIO")
			if !found {
				t.Fatalf("the output has no table:\n%s", out)
			}
			var got []string
			for line := range strings.Lines(printed) {
				fields := strings.Fields(line)
				if len(fields) > 2 && strings.Contains(fields[2], ".") {
					fields = append(fields[:2], fields[3:]...) // without the seconds
				}
				got = append(got, strings.Join(fields, " "))
			}
			if want := append([]string{"VERDICT SECONDS SEEN"}, test.want...); strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("table is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}
