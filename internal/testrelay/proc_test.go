//go:build linux

package testrelay

import (
	"os"
	"testing"
	"time"
)

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

// The kernel's counters of a process grow with what the process does.
func TestKernelCounts(t *testing.T) {
	const work = 30 * time.Millisecond
	cpu, err := CPUTime(0)
	if err != nil {
		t.Fatal(err)
	}
	calls, err := ReadsAndWrites(os.Getpid())
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
		// By its PID, as for a server.
		if after, err = CPUTime(os.Getpid()); err != nil || time.Now().After(deadline) {
			t.Fatalf("CPU time was %v, is %v; %v", cpu, after, err)
		}
	}
	if got, err := ReadsAndWrites(os.Getpid()); err != nil || got < calls+reads {
		t.Errorf("reads and writes were %d, are %d after %d reads; %v", calls, got, reads, err)
	}

	held := make([]byte, 64<<20)
	before, err := ResidentBytes(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(held); i += os.Getpagesize() {
		held[i] = 1
	}
	if got, err := ResidentBytes(os.Getpid()); err != nil || got < before+int64(len(held))/2 {
		t.Errorf("resident memory was %d, is %d after %d bytes were written; %v", before, got, len(held), err)
	}
	if _, err := CPUTime(1 << 23); err == nil {
		t.Error("a process that does not exist has CPU time")
	}
}
