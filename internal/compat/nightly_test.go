package compat

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// TestMain runs the double of systemctl when the test binary is linked under that
// name.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "systemctl" {
		os.Exit(systemctl())
	}
	os.Exit(m.Run())
}

// systemctl sends the command line to the double of systemd in the test's process,
// and prints the answer.
func systemctl() int {
	conn, err := new(net.Dialer).DialContext(context.Background(), "unix", os.Getenv("SYSTEMD"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var code int
	var word string
	_, err = fmt.Fprintln(conn, strings.Join(os.Args[1:], " "))
	if err == nil {
		_, err = fmt.Fscanln(conn, &code, &word)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if word != "done" {
		fmt.Println(word)
	}
	return code
}

// systemd is the double of systemd, for one service with docker/derpd.service's
// settings: Restart=on-failure, but not after exit code 2, RestartSec=2, TimeoutStopSec=5
// and StartLimitIntervalSec=0.
type systemd struct {
	t      *testing.T
	binary string
	env    []string

	mu       sync.Mutex // guards the fields below
	running  *exec.Cmd  // nil if none
	ended    chan struct{}
	state    string // as systemctl is-active prints it
	restarts int    // by systemctl
	stopping bool
}

// newSystemd listens for the double of systemctl on a socket.
func newSystemd(t *testing.T, socket, binary string, env []string) *systemd {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &systemd{t: t, binary: binary, env: env, state: "inactive"}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			served.Go(func() { s.answer(conn) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		served.Wait()
		s.stop()
	})
	return s
}

func (s *systemd) answer(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	line, err := bufio.NewReader(conn).ReadString('\n')
	command := strings.TrimSpace(line)
	code, word := 0, "done"
	service := command[strings.LastIndex(command, " ")+1:]
	switch verb := strings.TrimSuffix(command, " "+service); verb {
	case "show --property=LoadState --value":
		word = "loaded"
		if service != "derpd" {
			word = "not-found"
		}
	case "restart":
		s.stop()
		s.mu.Lock()
		s.restarts++
		s.mu.Unlock()
		code = s.start()
	case "reset-failed":
	case "is-active":
		s.mu.Lock()
		word = s.state
		s.mu.Unlock()
		if word != "active" {
			code = 3
		}
	default:
		s.t.Errorf("the double does not know systemctl %s: %v", command, err)
	}
	_, _ = fmt.Fprintln(conn, code, word)
}

// start starts the service.
func (s *systemd) start() (code int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = false
	cmd := exec.CommandContext(context.Background(), s.binary)
	cmd.Env = s.env
	if err := cmd.Start(); err != nil {
		s.state = "failed"
		return 1
	}
	ended := make(chan struct{})
	s.running, s.ended, s.state = cmd, ended, "active"
	go func() {
		_ = cmd.Wait()
		code := cmd.ProcessState.ExitCode()
		s.mu.Lock()
		s.running = nil
		again := !s.stopping && code != 0 && code != 2
		switch {
		case again:
			s.state = "activating"
		case code == 0 || s.stopping:
			s.state = "inactive"
		default:
			s.state = "failed"
		}
		s.mu.Unlock()
		if again {
			<-time.After(2 * time.Second)
			s.mu.Lock()
			again = s.state == "activating" && !s.stopping
			s.mu.Unlock()
			if again {
				s.start()
			}
		}
		close(ended)
	}()
	return 0
}

// stop ends the service, by SIGKILL after five seconds.
func (s *systemd) stop() {
	for {
		s.mu.Lock()
		s.stopping = true
		running, ended := s.running, s.ended
		s.mu.Unlock()
		if ended == nil {
			return
		}
		if running != nil {
			_ = running.Process.Signal(syscall.SIGTERM)
			timer := time.AfterFunc(5*time.Second, func() { _ = running.Process.Kill() })
			<-ended
			timer.Stop()
		} else {
			<-ended
		}
		s.mu.Lock()
		last := s.ended == ended
		s.mu.Unlock()
		if last {
			return
		}
	}
}

// asked returns how often systemctl restart was called since the last call.
func (s *systemd) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.restarts
	s.restarts = 0
	return n
}

// nightly is a machine with a relay, its sources, and docker/derpd-update.
type nightly struct {
	dir    string
	admin  string // address
	env    []string
	system *systemd
	uid    int // of the owner of the sources
}

// builder owns the sources if root runs the tests.
const builder = 65532

// makefile stands for the sources' Makefile. A build takes the file next, and leaves a
// process behind, as the go command does for its telemetry.
const makefile = `
upstream:
	@echo taken >>go.mod
	@[ ! -e upstream-fails ]
build:
	@(id -u; env) >$(HOME)/environment
	@[ ! -p %[1]s ] || cat %[1]s
	@cp next $(BINARY)
	@sleep 20 >/dev/null 2>&1 &
`

// newNightly installs a relay and starts it.
func newNightly(t *testing.T, installed string) *nightly {
	t.Helper()
	for _, name := range []string{"flock", "setpriv", "make", "git"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("no %s on this machine", name)
		}
	}
	// The owner of the sources cannot reach t.TempDir.
	dir, err := os.MkdirTemp("", "derpd-update-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &nightly{dir: dir, uid: os.Getuid(), admin: testkit.FreeAddr(t)}
	if n.uid == 0 {
		n.uid = builder
	}
	for _, name := range []string{"", "bin", "my programs", "cache", "state", "my sources"} {
		if err := errors.Join(os.MkdirAll(n.at(name), 0o755), os.Chmod(n.at(name), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, n.at("bin/systemctl")); err != nil {
		t.Fatal(err)
	}
	n.write(t, "my sources/Makefile", fmt.Sprintf(makefile, n.at("gate")))
	n.write(t, "my sources/go.mod", "module derpd\n")
	n.install(t, "my programs/derpd", installed)
	n.next(t, installed)
	settings := testkit.LastOfEach(append(environment(t), "DERP_ADMIN_ADDR="+n.admin, "DERP_HTTP_PORT=0"))
	n.system = newSystemd(t, n.at("systemd.sock"), n.at("my programs/derpd"), settings)
	n.env = append(settings, "PATH="+n.at("bin")+":"+os.Getenv("PATH"), "SYSTEMD="+n.at("systemd.sock"),
		"UPDATE_SOURCES="+n.at("my sources"), "UPDATE_BINARY="+n.at("my programs/derpd"), "STATE_DIRECTORY="+n.at("state"), "CACHE_DIRECTORY="+n.at("cache"),
		"GOPROXY=https://modules.example.com")
	if code := n.system.start(); code != 0 {
		t.Fatalf("the relay does not start: %d", code)
	}
	n.awaitReady(t)
	return n
}

func (n *nightly) at(name string) string { return filepath.Join(n.dir, name) }

func (n *nightly) write(t *testing.T, name, content string) {
	t.Helper()
	// A running program cannot be written to.
	if err := os.Remove(n.at(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(n.at(name), []byte(content), 0o755), os.Chmod(n.at(name), 0o755)); err != nil {
		t.Fatal(err)
	}
}

// install writes a program, whose content or path is given.
func (n *nightly) install(t *testing.T, name, program string) {
	t.Helper()
	if filepath.IsAbs(program) {
		program = read(t, program)
	}
	n.write(t, name, program)
}

// next is what the next build makes.
func (n *nightly) next(t *testing.T, program string) {
	t.Helper()
	n.install(t, "my sources/next", program)
	n.own(t)
}

// own gives the sources to their owner.
func (n *nightly) own(t *testing.T) {
	t.Helper()
	if n.uid != os.Getuid() {
		run(t, n.dir, "chown", "-R", fmt.Sprintf("%d:%d", n.uid, n.uid), "my sources")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// ready returns an error unless the relay is ready.
func (n *nightly) ready(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.admin+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(string(body))
	}
	return err
}

func (n *nightly) awaitReady(t *testing.T) {
	t.Helper()
	testkit.Wait(t, "the relay to be ready", n.ready)
}

// command is the script, in a process group of its own.
func (n *nightly) command(t *testing.T, env ...string) (*exec.Cmd, *testkit.Buffer) {
	t.Helper()
	script, err := filepath.Abs(filepath.Join(root, "docker", "derpd-update"))
	if err != nil {
		t.Fatal(err)
	}
	out := new(testkit.Buffer)
	cmd := exec.CommandContext(t.Context(), script)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = testkit.LastOfEach(append(n.env, env...)), n.dir, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	return cmd, out
}

// night is the result of one run of the script.
type night struct {
	code     int
	output   string
	restarts int           // asked of systemd
	away     time.Duration // longest time in which the relay was not ready
}

// run runs the script once, and measures how long the relay is away.
func (n *nightly) run(t *testing.T, env ...string) night {
	t.Helper()
	cmd, out := n.command(t, env...)
	ctx, cancel := context.WithCancel(t.Context())
	away := make(chan time.Duration)
	go func() {
		var longest time.Duration
		last := time.Now()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			if _, err := os.Stat(n.at("my programs/derpd")); err != nil {
				t.Error(err)
			}
			if n.ready(ctx) == nil {
				longest, last = max(longest, time.Since(last)), time.Now()
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		away <- longest
	}()
	err := cmd.Run()
	if _, failed := errors.AsType[*exec.ExitError](err); err != nil && !failed {
		t.Fatal(err)
	}
	cancel()
	result := night{cmd.ProcessState.ExitCode(), out.String(), n.system.asked(), <-away}
	t.Logf("exit code %d, %d restarts, away %v\n%s", result.code, result.restarts, result.away.Round(time.Millisecond), result.output)
	return result
}

// want checks the exit code, the number of restarts, and the last line.
func (r night) want(t *testing.T, code, restarts int, line string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.output), "\n")
	last := strings.TrimPrefix(lines[len(lines)-1], "derpd-update: ")
	if r.code != code || r.restarts != restarts || !strings.HasPrefix(last, line) {
		t.Errorf("exit code %d, %d restarts, %q\nwant      %d, %d restarts, %q", r.code, r.restarts, last, code, restarts, line)
	}
}

// runs checks the relay that runs, the installed binary and the files beside it.
func (n *nightly) runs(t *testing.T, program string, files ...string) {
	t.Helper()
	n.awaitReady(t)
	want := read(t, program)
	n.system.mu.Lock()
	exe := fmt.Sprintf("/proc/%d/exe", n.system.running.Process.Pid)
	n.system.mu.Unlock()
	if read(t, exe) != want {
		t.Error("another relay runs")
	}
	if read(t, n.at("my programs/derpd")) != want {
		t.Error("another binary is installed")
	}
	n.lists(t, "my programs", append([]string{"derpd"}, files...)...)
	n.lists(t, "cache/build", "home")
	if got := read(t, n.at("my sources/go.mod")); got != "module derpd\n" {
		t.Errorf("go.mod of the sources is %q", got)
	}
}

func (n *nightly) lists(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(n.at(dir))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

// link builds derpd with a version.
func link(t *testing.T, version string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "derpd")
	run(t, root, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-ldflags", "-s -w -buildid= -X main.version="+version, "-o", binary, "./cmd/derpd")
	return binary
}

// broken is a derpd that does what the lines of a shell script say, and else what a
// real one does.
func broken(real, script string) string {
	return "#!/bin/sh\nserves() { [ $# -eq 0 ]; }\n" + script + "\nexec " + real + " \"$@\"\n"
}

// TestNightlyUpdate runs docker/derpd-update with good, broken and hanging binaries.
// Real relays run, and only systemd is a double.
func TestNightlyUpdate(t *testing.T) {
	first, second := link(t, "1.0.0"), link(t, "2.0.0")
	for name, test := range map[string]func(t *testing.T, first, second string){
		"good": good, "the build fails": buildFails, "cure": cure, "stopped": stopped, "disk full": diskFull, "neither is ready": neither, "lock": lock, "terminated": terminated, "killed": killed, "pull": pull,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of the time is waiting
			test(t, first, second)
		})
	}
	// Binaries that are refused after a restart, and by which message.
	for name, tt := range map[string]struct{ script, cause string }{
		"never ready":                 {`serves "$@" && export DERP_DOMAIN=derp.example.com DERP_ACME_CA=https://127.0.0.1:1/directory`, "not ready: "},
		"ends at once":                {`serves "$@" && exit 1`, "the service ended; journalctl -u derpd has the reason"},
		"refuses to start":            {`serves "$@" && exit 2`, "the service ended; "},
		"hangs at the start":          {`serves "$@" && trap "" TERM && exec sleep 1000`, "derpd: no relay answers on DERP_ADMIN_ADDR "},
		"hangs at the healthcheck":    {`[ "$1" != healthcheck ] || exec sleep 1000`, "derpd healthcheck gave no answer within 2 s"},
		"finds itself ready, wrongly": {"[ \"$1\" != healthcheck ] || exit 0\nserves \"$@\" && exec sleep 1000", "derpd: no relay answers on DERP_ADMIN_ADDR "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNightly(t, first)
			n.install(t, "real", first)
			n.next(t, broken(n.at("real"), tt.script))
			short := []string{"UPDATE_READY_SECONDS=3", "UPDATE_TRIAL_SECONDS=2"}
			r := n.run(t, short...)
			r.want(t, 1, 2, "the new binary was not ready: "+tt.cause)
			if !strings.HasSuffix(strings.TrimSpace(r.output), "; the old one is back and ready") {
				t.Error("the last line does not say that the old relay is back")
			}
			if r.away > 30*time.Second {
				t.Errorf("the relay was away for %v", r.away)
			}
			n.runs(t, first)
			n.lists(t, "state", "lock", "refused")
			r = n.run(t, short...)
			r.want(t, 1, 0, "the same new binary was refused before: "+tt.cause)
			n.runs(t, first)
			n.next(t, second)
			n.run(t).want(t, 0, 1, "updated from derpd 1.0.0")
			n.runs(t, second, "derpd.old")
			n.lists(t, "state", "lock")
		})
	}
	// Binaries that are refused before a restart.
	for name, tt := range map[string]struct{ content, message string }{
		"garbage":              {"\x7fELF\x00garbage", "the new binary does not run: "},
		"empty":                {"", "the new binary "},
		"another program":      {"#!/bin/sh\necho hello\n", "the new binary is not derpd: derpd version printed hello; "},
		"hangs":                {"#!/bin/sh\ntrap '' TERM\nexec sleep 1000\n", "the new binary hangs: derpd version gave no answer within 2 s; "},
		"refuses the settings": {"#!/bin/sh\n[ \"$1\" != version ] || exec echo derpd 3\necho 'derpd: DERP_ADDR: gone' >&2\nexit 2\n", "the new binary refuses the relay's configuration: derpd: DERP_ADDR: gone; "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNightly(t, first)
			n.next(t, tt.content)
			r := n.run(t, "UPDATE_TRIAL_SECONDS=2")
			r.want(t, 1, 0, tt.message)
			n.runs(t, first)
			n.lists(t, "state", "lock")
		})
	}
}

// good asserts that a new binary replaces the old one, and that the same one does
// nothing.
func good(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.run(t).want(t, 0, 0, "nothing new; the relay was left alone")
	n.runs(t, first)
	n.next(t, second)
	r := n.run(t)
	r.want(t, 0, 1, "updated from derpd 1.0.0, tailscale.com v")
	if r.away > 10*time.Second {
		t.Errorf("the relay was away for %v", r.away)
	}
	n.runs(t, second, "derpd.old")
	n.lists(t, "state", "lock")
	if read(t, n.at("my programs/derpd.old")) != read(t, first) {
		t.Error("derpd.old is not the old binary")
	}
	built := strings.Split(read(t, n.at("cache/build/home/environment")), "\n")
	if built[0] != fmt.Sprint(n.uid) || !strings.Contains(strings.Join(built, "\n"), "GOPROXY=https://modules.example.com") || strings.Contains(strings.Join(built, "\n"), "DERP_") {
		t.Errorf("the build ran as uid %s, with\n%s", built[0], strings.Join(built[1:], "\n"))
	}
	n.run(t).want(t, 0, 0, "nothing new")
}

// buildFails asserts that the relay is left alone when nothing can be built,
// and that the sources are built as they are when newer versions cannot be taken.
func buildFails(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.write(t, "my sources/Makefile", "upstream build:\n\t@echo no network; exit 1\n")
	n.run(t).want(t, 1, 0, "make build failed, as said above; the relay was left alone")
	n.runs(t, first)

	n.write(t, "my sources/Makefile", fmt.Sprintf(makefile, n.at("gate")))
	n.write(t, "my sources/upstream-fails", "")
	n.run(t).want(t, 1, 0, "make upstream failed, as said above; the relay was left alone")
	n.next(t, second)
	n.run(t).want(t, 1, 1, "make upstream failed, as said above; the relay was updated all the same")
	n.runs(t, second, "derpd.old")
}

// cure asserts that a relay that is not ready is updated as well.
func cure(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.install(t, "real", first)
	n.write(t, "my programs/derpd", broken(n.at("real"), `serves "$@" && exit 2`))
	n.system.stop()
	n.system.start()
	testkit.Until(t, "the relay to fail", func() bool {
		n.system.mu.Lock()
		defer n.system.mu.Unlock()
		return n.system.state == "failed"
	})
	n.next(t, second)
	r := n.run(t)
	r.want(t, 0, 1, "updated from derpd 1.0.0")
	if !strings.Contains(r.output, "derpd-update: the relay is not ready before the update: derpd: no relay answers") {
		t.Error("no line about the relay before the update")
	}
	n.runs(t, second, "derpd.old")
}

// stopped asserts that a relay that its operator stopped is not started, also if that was
// during the build, and that it is updated when it was started again.
func stopped(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.next(t, second)
	n.system.stop()
	n.run(t).want(t, 0, 0, "derpd is stopped, and was left alone")
	n.system.start()
	n.awaitReady(t)
	n.runs(t, first)

	if err := errors.Join(syscall.Mkfifo(n.at("gate"), 0o644), os.Chmod(n.at("gate"), 0o644)); err != nil {
		t.Fatal(err)
	}
	go func() {
		gate, _ := os.OpenFile(n.at("gate"), os.O_WRONLY, 0) // waits for the build
		n.system.stop()
		_ = gate.Close()
	}()
	n.run(t).want(t, 1, 0, "derpd was stopped during the build, and was left alone")
	if err := os.Remove(n.at("gate")); err != nil {
		t.Fatal(err)
	}
	n.lists(t, "my programs", "derpd")
	n.lists(t, "state", "lock")
	n.system.start()
	n.awaitReady(t)
	n.runs(t, first)
	n.run(t).want(t, 0, 1, "updated from derpd 1.0.0")
	n.run(t, "UPDATE_SERVICE=relay").want(t, 1, 0, "UPDATE_SERVICE: the state of the service relay is not-found; name the relay's service")
}

// diskFull asserts that a relay is left alone when there is no room for a second binary,
// or for none.
func diskFull(t *testing.T, first, second string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	n := newNightly(t, first)
	n.system.stop()
	for i, message := range []string{"the new binary could not be copied to ", "the old binary could not be copied to "} {
		size := int64(i+1)*int64(len(read(t, first))) + 1<<20
		if err := syscall.Mount("none", n.at("my programs"), "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
			t.Skipf("mounting a small disk: %v", err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(n.at("my programs"), syscall.MNT_DETACH) })
		n.install(t, "my programs/derpd", first)
		n.next(t, second)
		n.system.start()
		n.awaitReady(t)
		n.run(t).want(t, 1, 0, message+n.at("my programs/derpd"))
		n.runs(t, first)
		n.lists(t, "state", "lock")
		n.system.stop()
	}
}

// neither asserts that a new binary is tried again when the old one was not ready either,
// as without network.
func neither(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.next(t, second)
	r := n.run(t, "DERP_ADMIN_ADDR="+testkit.FreeAddr(t), "UPDATE_READY_SECONDS=3")
	r.want(t, 1, 2, "the new binary was not ready: derpd: no relay answers")
	if !strings.Contains(r.output, "; the old one is back, and not ready either: ") {
		t.Error("the last line does not say that the old relay is not ready")
	}
	n.runs(t, first)
	n.lists(t, "state", "lock")
	n.run(t).want(t, 0, 1, "updated from derpd 1.0.0")
}

// lock asserts that a second run ends at once while the first one builds.
func lock(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.next(t, second)
	if err := errors.Join(syscall.Mkfifo(n.at("gate"), 0o644), os.Chmod(n.at("gate"), 0o644)); err != nil {
		t.Fatal(err)
	}
	cmd, out := n.command(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	opened := make(chan *os.File, 1)
	go func() {
		gate, _ := os.OpenFile(n.at("gate"), os.O_WRONLY, 0) // waits for the build
		opened <- gate
	}()
	gate := testkit.Receive(t, "the build", opened)
	n.run(t).want(t, 1, 0, "another update is running")
	if err := gate.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	n.runs(t, second, "derpd.old")
	// The lock ends with the run, although the new relay stays.
	n.system.asked()
	if err := os.Remove(n.at("gate")); err != nil {
		t.Fatal(err)
	}
	n.run(t).want(t, 0, 0, "nothing new")
}

func terminated(t *testing.T, first, second string) {
	t.Helper()
	interrupted(t, syscall.SIGTERM, first, second)
}

func killed(t *testing.T, first, second string) {
	t.Helper()
	interrupted(t, syscall.SIGKILL, first, second)
}

// interrupted ends the script while it waits for a relay that hangs. After
// SIGTERM it goes back by itself, after SIGKILL the next run does. The binary was not
// judged, so it is not refused.
func interrupted(t *testing.T, signal syscall.Signal, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	n.install(t, "real", first)
	n.next(t, broken(n.at("real"), `serves "$@" && exec sleep 1000`))
	cmd, out := n.command(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testkit.Until(t, "the restart with the new binary", func() bool {
		n.system.mu.Lock()
		defer n.system.mu.Unlock()
		return n.system.restarts == 1
	})
	if err := syscall.Kill(-cmd.Process.Pid, signal); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the script succeeds")
	}
	t.Log(out)
	if _, err := os.Stat(n.at("my programs/derpd")); err != nil {
		t.Error(err)
	}
	want := 1
	if signal == syscall.SIGTERM {
		n.runs(t, first)
		n.lists(t, "state", "lock")
	} else {
		n.lists(t, "state", "lock", "trying")
		want++
	}
	n.system.asked()
	n.next(t, second)
	r := n.run(t)
	r.want(t, 0, want, "updated from derpd 1.0.0")
	n.runs(t, second, "derpd.old")
	n.lists(t, "state", "lock")
}

// pull asserts that newer sources are taken, and that changes of the user
// are kept and built.
func pull(t *testing.T, first, second string) {
	t.Helper()
	n := newNightly(t, first)
	git := func(args ...string) {
		t.Helper()
		n.own(t)
		cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.com"}, args...)...)
		cmd.Dir, cmd.Env = n.at("my sources"), append(os.Environ(), "HOME="+n.at("my sources"))
		if n.uid != os.Getuid() {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: builder, Gid: builder}}
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
	}
	git("init", "--quiet", "--initial-branch=main")
	git("add", "--all")
	git("commit", "--quiet", "--message=first")
	git("clone", "--quiet", "--bare", ".", n.at("my sources/.git/origin"))
	git("remote", "add", "origin", n.at("my sources/.git/origin"))
	git("fetch", "--quiet")
	git("branch", "--quiet", "--set-upstream-to=origin/main")
	n.next(t, second)
	git("commit", "--quiet", "--all", "--message=second")
	git("push", "--quiet", "origin", "main")
	git("reset", "--quiet", "--hard", "HEAD^")
	n.own(t)
	n.run(t).want(t, 0, 1, "updated from derpd 1.0.0")
	n.runs(t, second, "derpd.old")

	git("reset", "--quiet", "--hard", "HEAD^")
	change := read(t, first) + "a change of the user"
	n.next(t, change)
	r := n.run(t)
	r.want(t, 0, 1, "updated from derpd 2.0.0")
	if !strings.Contains(r.output, "newer sources not taken, git pull --ff-only failed: ") {
		t.Error("no line about the sources")
	}
	if read(t, n.at("my sources/next")) != change || read(t, n.at("my programs/derpd")) != change {
		t.Error("the change of the user is lost")
	}
}
