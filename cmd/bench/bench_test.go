//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/net/stun"
)

var update = flag.Bool("update", false, "write the expected reports")

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{5, 1, 2}, spread{2, 1, 5}},
		{[]float64{4, 1, 8, 2}, spread{3, 1, 8}},
	} {
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("spread of %v: %v, want %v", c.values, got, c.want)
		}
	}
}

func TestRatios(t *testing.T) {
	// The round without a value of derper, and the one without a partner, have
	// no ratio.
	got := ratios([]float64{1, 2, 3, 4}, []float64{2, 0, 2})
	if want := []float64{0.5, 1.5}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestMean(t *testing.T) {
	// What was not measured every time has no mean.
	got := mean([]sample{{packetRate: 1, delayP99: 5, systemCallsPer: 1}, {packetRate: 2, delayP99: 0}})
	if want := (sample{packetRate: 1.5, delayP99: 2.5}); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestOrder(t *testing.T) {
	for _, c := range []struct {
		round int
		again bool
		want  []int
	}{
		{0, false, []int{0, 1}},
		{1, false, []int{1, 0}},
		{2, true, []int{0, 1, 1, 0}},
		{3, true, []int{1, 0, 0, 1}},
	} {
		if got := order(c.round, c.again); !slices.Equal(got, c.want) {
			t.Errorf("round %d, again %t: %v, want %v", c.round, c.again, got, c.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	var list []time.Duration
	if got := quantile(list, 0.99); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
	for i := range 100 {
		list = append(list, time.Duration(i))
	}
	for share, want := range map[float64]time.Duration{0: 0, 0.5: 50, 0.99: 99, 1: 99} {
		if got := quantile(list, share); got != want {
			t.Errorf("%v: %d, want %d", share, got, want)
		}
	}
}

func TestNumber(t *testing.T) {
	for x, want := range map[float64]string{
		0: "0", 0.012345: "0.0123", 0.09996: "0.100", 0.9996: "1.00", 9.999: "10.0",
		12.34: "12.3", 999.6: "1,000", 12345: "12,300", 1234567: "1,230,000", -1234: "-1,230",
	} {
		if got := number(x); got != want {
			t.Errorf("%v: %q, want %q", x, got, want)
		}
	}
}

func TestParseValue(t *testing.T) {
	const text = "Rss_total:  7 kB\nRss:      1234 kB\nsyscr: 12\nempty:\nword: x\n"
	for name, want := range map[string]int64{"Rss": 1234, "syscr": 12} {
		if got, err := parseValue(text, name); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", name, got, err, want)
		}
	}
	for _, name := range []string{"missing", "empty", "word"} {
		if got, err := parseValue(text, name); err == nil {
			t.Errorf("%s: %d", name, got)
		}
	}
}

func TestParseStat(t *testing.T) {
	got, err := parseStat("cpu  1 2 3 1000 2000 4 5 6 0 0\ncpu0 1 2 3 1000 2000 4 5 6 0 0\n")
	if want := (1 + 2 + 3 + 4 + 5 + 6) * tick; err != nil || got != want {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, text := range []string{"", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n", "cpu a b c d e f g h\n"} {
		if got, err := parseStat(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestParsePerf(t *testing.T) {
	got, err := parsePerf("12345,,raw_syscalls:sys_enter,1204230,100.00,,\n")
	if err != nil || got != 12345 {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "Error: no permission\n", "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"} {
		if got, err := parsePerf(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// What the kernel tells of a process follows what the process does.
func TestKernelCounts(t *testing.T) {
	const work = 30 * time.Millisecond
	cpu, err := cpuTime(0)
	if err != nil {
		t.Fatal(err)
	}
	calls, err := readsAndWrites(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = zero.Close() }()
	const reads = 100
	for range reads {
		if _, err := zero.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	var after time.Duration
	for deadline := time.Now().Add(time.Minute); after-cpu < work; {
		// By its number, as a server's is asked.
		if after, err = cpuTime(os.Getpid()); err != nil || time.Now().After(deadline) {
			t.Fatalf("CPU time was %v, is %v; %v", cpu, after, err)
		}
	}
	if got, err := readsAndWrites(os.Getpid()); err != nil || got < calls+reads {
		t.Errorf("reads and writes were %d, are %d after %d reads; %v", calls, got, reads, err)
	}

	held := make([]byte, 64<<20)
	before, err := residentBytes(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(held); i += os.Getpagesize() {
		held[i] = 1
	}
	if got, err := residentBytes(os.Getpid()); err != nil || got < before+int64(len(held))/2 {
		t.Errorf("resident memory was %d, is %d after %d bytes were written; %v", before, got, len(held), err)
	}
	if _, err := cpuTime(1 << 23); err == nil {
		t.Error("a process that does not exist has CPU time")
	}
}

// The id that is taken from a STUN answer without parsing it is
// the one that was asked with.
func TestAnswer(t *testing.T) {
	id := stun.NewTxID()
	answer := stun.Response(id, netip.MustParseAddrPort("192.0.2.1:1234"))
	if got, err := answerTo(answer); err != nil || got != id {
		t.Errorf("%x, %v; want %x", got, err, id)
	}
	for _, b := range [][]byte{nil, answer[:19], stun.Request(id)} {
		if _, err := answerTo(b); err == nil {
			t.Errorf("%x is taken for an answer", b)
		}
	}
}

// Targets are about what is measured, under the names that it has.
func TestTargetsAreMeasured(t *testing.T) {
	for name, o := range map[string]options{"default": {}, "full": {full: true}} {
		var measured []string
		for _, m := range selection(o) {
			measured = append(measured, m.name)
		}
		for _, target := range targets() {
			if !slices.Contains(measured, target.measurement) {
				t.Errorf("%s: %q is a target and not measured", name, target.measurement)
			}
			if rank(target.metric) >= len(metrics) || target.en == "" || target.zh == "" {
				t.Errorf("%q: %q has no rank or no label", target.measurement, target.metric)
			}
		}
	}
	only := selection(options{quick: true, only: regexp.MustCompile("^STUN")})
	if len(only) != 2 || only[0].name != stunName(1) {
		t.Errorf("--only ^STUN selects %v", only)
	}
}

func TestVerdicts(t *testing.T) {
	relay := load{size: 1280, pairs: 8, burst: 1}.name()
	small := load{size: 64, pairs: 8, burst: 1}.name()
	for _, c := range []struct {
		what          string
		measurement   string
		metric        metric
		derper, derpd []float64
		reached       bool
	}{
		{"at the limit", relay, cpuPerPacket, []float64{10}, []float64{7}, true},
		{"as shown, at the limit", relay, cpuPerPacket, []float64{10}, []float64{7.04}, true},
		{"over the limit", relay, cpuPerPacket, []float64{10}, []float64{7.06}, false},
		{"the median counts", relay, cpuPerPacket, []float64{10, 10, 10}, []float64{9, 6, 6}, true},
		{"the median of the ratios, not of the values", relay, cpuPerPacket, []float64{10, 20, 40}, []float64{9, 18, 20}, false},
		{"enough", relay, packetRate, []float64{100}, []float64{120}, true},
		{"not enough", relay, packetRate, []float64{100}, []float64{119}, false},
		{"worse in every round", small, cpuPerPacket, []float64{10, 10}, []float64{10.1, 10.2}, false},
		{"worse in one round", small, cpuPerPacket, []float64{10, 10}, []float64{9.9, 10.4}, true},
		{"a start as fast", startName, startDERP, []float64{10}, []float64{10}, true},
		{"a start as slow", startName, startDERP, []float64{600}, []float64{501}, false},
	} {
		r := &report{Rounds: len(c.derper)}
		for i := range c.derper {
			r.add(c.measurement, derper, sample{c.metric: c.derper[i]})
			r.add(c.measurement, derpd, sample{c.metric: c.derpd[i]})
		}
		r.conclude()
		if len(r.Targets) != 1 || r.Targets[0].Reached != c.reached || (r.missed() == 0) != c.reached {
			t.Errorf("%s: %+v", c.what, r.Targets)
		}
	}
}

func TestNotes(t *testing.T) {
	r := &report{Rounds: 2, Pinned: true}
	packets := load{size: 64, pairs: 8, burst: 1}.name()
	r.add(connectName, derper, sample{connectRate: 1, serverBusy: 0.5, loadBusy: 0.99, othersBusy: 0.3})
	r.add(connectName, derpd, sample{connectRate: 1, serverBusy: 0.95, loadBusy: 0.8, othersBusy: 0})
	r.add(packets, derpd, sample{packetRate: 1, serverBusy: 0.95, loadBusy: 0.93})
	r.add(stunName(stunBurst), derpd, sample{answerRate: 1, serverBusy: 0.85})
	r.add(stunName(1), derpd, sample{answerRate: 1, serverBusy: 0.5, loadBusy: 0.5, lostPackets: 3})
	r.conclude()
	want := []string{
		"connect: derper used 50% of its CPUs, the load 99%: the load may have been the limit",
		packets + ": derpd used 95% of its CPUs, the load 93%",
		"STUN, bursts of 16: derpd used 85% of its CPUs: the load was the limit",
		"STUN, one at a time: with derpd, up to 3 were lost in a round",
		"others used up to 30% of the CPUs",
		"2 rounds are too few",
	}
	if len(r.Notes) != len(want) {
		t.Fatalf("%q", r.Notes)
	}
	for i, begin := range want {
		if !strings.HasPrefix(r.Notes[i], begin) {
			t.Errorf("%q, want %q", r.Notes[i], begin)
		}
	}
}

// The values in testdata are made up.
func TestReport(t *testing.T) {
	r, err := readReport("testdata/report.json")
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := r.writeTable(&table); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/table.txt", table.String())
	golden(t, "testdata/picture.svg", string(r.picture()))
	golden(t, "testdata/docs.en.md", r.docs(0))
	golden(t, "testdata/docs.zh.md", r.docs(1))

	again := filepath.Join(t.TempDir(), "again.json")
	if err := r.writeJSON(again); err != nil {
		t.Fatal(err)
	}
	copied, err := readReport(again)
	if err != nil || string(copied.picture()) != string(r.picture()) {
		t.Errorf("what was written is read as something else: %v", err)
	}

	decoder := xml.NewDecoder(strings.NewReader(string(r.picture())))
	for {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the picture is not XML: %v", err)
		}
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != got {
		t.Errorf("%s: %v; got\n%s\nwant\n%s", path, err, got, want)
	}
}

// The READMEs and the picture are what docker/bench.json says, and `make
// bench-docs` finds its place in them.
func TestDocs(t *testing.T) {
	root := filepath.Join("..", "..")
	r, err := readReport(filepath.Join(root, "docker", "bench.json"))
	if errors.Is(err, fs.ErrNotExist) {
		// Nothing was measured for the documents yet.
		if r, err = readReport("testdata/report.json"); err != nil {
			t.Fatal(err)
		}
		for i, l := range languages {
			if _, err := r.withDocs(contents(t, filepath.Join(root, l.file)), i); err != nil {
				t.Errorf("%s: %v", l.file, err)
			}
		}
		return
	} else if err != nil {
		t.Fatal(err)
	}
	for i, l := range languages {
		old := contents(t, filepath.Join(root, l.file))
		if want, err := r.withDocs(old, i); err != nil || want != old {
			t.Errorf("%s is not what docker/bench.json says; run: go run ./cmd/bench --from docker/bench.json --docs (%v)", l.file, err)
		}
	}
	if contents(t, filepath.Join(root, pictureFile)) != string(r.picture()) {
		t.Errorf("%s is not what docker/bench.json says", pictureFile)
	}
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "--derper and --derpd are needed"},
		{"--quick --full", "exclude each other"},
		{"--rounds 0", "at least one"},
		{"--window 7", "a burst of 8 must fit"},
		{"--only (", "missing closing"},
		{"--derpd-env X", "not NAME=VALUE"},
		{"--from x y", `unexpected argument "y"`},
		{"--derper a --derpd b --only nothing-has-this-name", "no measurement has such a name"},
	} {
		err := run(t.Context(), strings.Fields(c.args), io.Discard, io.Discard)
		if _, ok := errors.AsType[usageError](err); !ok || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v; want %q", c.args, err, c.want)
		}
		if code := exitCode(err, io.Discard); code != exitUsage {
			t.Errorf("%q: exit code %d", c.args, code)
		}
	}
	// testdata has targets that are not reached.
	args := []string{"--from", "testdata/report.json"}
	if err := run(t.Context(), args, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	err := run(t.Context(), append(args, "--check"), io.Discard, io.Discard)
	if code := exitCode(err, io.Discard); code != exitFailed || !strings.Contains(err.Error(), "targets are not reached") {
		t.Errorf("--check: %d, %v", code, err)
	}
}

// Both servers, really measured: short, so that the numbers mean nothing, but
// all of them are there.
func TestMeasure(t *testing.T) {
	path := os.Getenv("DERPD_DERPER")
	if path == "" {
		t.Skip("upstream's derper is needed: run make test")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("DERPD_DERPER: %v", err)
	}
	ctx := t.Context()
	dir := t.TempDir()
	built := filepath.Join(dir, "derpd-built")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", built, "derpd/cmd/derpd").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	certificate, err := makeCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	first := members(allowed)[:1]
	programs := []*program{
		{name: derper, path: path, describe: derperCommand, dir: dir, certificate: certificate, cpus: first},
		{name: derpd, path: built, describe: derpdCommand, dir: dir, certificate: certificate, cpus: first},
	}

	const moment = 500 * time.Millisecond // in which something happens on any machine
	const clients = 200
	var list []measurement
	expect := map[string][]metric{}
	add := func(name string, run func(context.Context, *server) (sample, error), metrics ...metric) {
		list = append(list, measurement{name: name, run: run})
		expect[name] = metrics
	}
	for _, l := range []load{
		{size: 1280, pairs: 2, burst: 8, window: queueDepth, time: moment},
		{size: 64, pairs: 2, burst: 1, window: queueDepth, time: moment, alone: true},
	} {
		add(l.name(), func(ctx context.Context, s *server) (sample, error) { return measureRelay(ctx, s, l) },
			packetRate, cpuPerPacket, cpuPerByte, callsPer, serverBusy, loadBusy)
	}
	slow := load{size: 8192, pairs: 3, burst: 2, rate: 200, window: queueDepth, time: moment}
	add(slow.name(), func(ctx context.Context, s *server) (sample, error) { return measureRelay(ctx, s, slow) },
		cpuPerPacket, delayMedian, delayP99)
	add(connectName, newConnects(4*moment).measure, connectRate, cpuPerConnect)
	for _, burst := range []int{1, stunBurst} {
		add(stunName(burst), func(ctx context.Context, s *server) (sample, error) { return measureSTUN(ctx, s, burst, moment) },
			answerRate, answersPer)
	}
	add(idleName(clients), func(ctx context.Context, s *server) (sample, error) {
		return measureIdle(ctx, s.program, clients, moment)
	}, memoryPerClient, memoryAlone)
	add(startName, func(ctx context.Context, s *server) (sample, error) { return measureStart(ctx, s.program, 1) },
		startDERP, startSTUN)
	add("where it runs", func(_ context.Context, s *server) (sample, error) {
		var set unix.CPUSet
		err := unix.SchedGetaffinity(s.pid, &set)
		if got := members(set); !slices.Equal(got, first) {
			t.Errorf("%s runs on CPUs %v, want %v", s.name, got, first)
		}
		return nil, err
	})

	r := &report{Rounds: 1}
	if err := measureRound(ctx, list, programs, 1, r, io.Discard); err != nil {
		t.Fatal(err)
	}
	r.conclude()
	for name, metrics := range expect {
		for _, m := range metrics {
			found := r.find(name, m)
			if found == nil || len(found.Derper) != r.Rounds || len(found.Derpd) != r.Rounds {
				t.Errorf("%s, %s: %+v", name, m, found)
				continue
			}
			if least := min(slices.Min(found.Derper), slices.Min(found.Derpd)); least <= 0 {
				t.Errorf("%s, %s: %v", name, m, least)
			}
		}
		// UDP may be lost.
		if lost := r.find(name, lostPackets); lost != nil && strings.HasPrefix(name, "relay") && slices.Max(append(lost.Derper, lost.Derpd...)) > 0 {
			t.Errorf("%s: packets were lost: %+v", name, lost)
		}
	}
}

// The long path brings everything, in order, and late: in a process of its own,
// in a network namespace of its own.
func TestLongPath(t *testing.T) {
	const inside = "DERPD_TEST_OWN_NETWORK"
	if os.Getenv(inside) == "" {
		if _, err := os.Stat("/dev/net/tun"); err != nil || os.Getuid() != 0 {
			t.Skip("needs root and /dev/net/tun")
		}
		command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLongPath$")
		command.Env = append(os.Environ(), inside+"=1")
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	ctx := t.Context()
	if err := ownNetwork(ctx); err != nil {
		t.Fatal(err)
	}
	path, err := newPath(ctx)
	if err != nil {
		t.Fatal(err)
	}
	carried := make(chan error, 1)
	go func() { carried <- path.carry() }()
	if ownNetwork(ctx) == nil {
		t.Error("a network with a device is taken for one of its own")
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", netip.AddrPortFrom(pathNear, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("derpd\n"), 40000) // of some hundred packets, a few get lost
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Write(sent)
		_ = conn.Close()
	}()
	var conn net.Conn
	began := time.Now()
	if err := path.inFar(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 2*pathDelay {
		t.Errorf("there and back in %v, want %v at least", took, 2*pathDelay)
	}
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes arrived as they were sent: %v, %v", len(got), bytes.Equal(got, sent), err)
	}
	path.close()
	if err := <-carried; err == nil {
		t.Error("no error of a device that is closed")
	}
}
