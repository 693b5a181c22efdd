//go:build linux

package testrelay

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPUTime returns the CPU time of all threads of a process, including ended threads.
// PID 0 is this process. The clock has a resolution of nanoseconds; /proc/PID/stat
// has hundredths of a second.
func CPUTime(pid int) (time.Duration, error) {
	// clock_getcpuclockid(3), CPUCLOCK_SCHED.
	clock := int32(^pid<<3 | 2)
	if pid == 0 {
		clock = unix.CLOCK_PROCESS_CPUTIME_ID
	}
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// ResidentBytes returns the resident memory of a process. Other counters of the
// kernel, as in /proc/PID/statm, may lag behind.
func ResidentBytes(pid int) (int64, error) {
	kib, err := procValue(pid, "smaps_rollup", "Rss")
	return kib << 10, err
}

// ReadsAndWrites counts the calls of read, write and their variants (readv, pread,
// sendfile and so on, but not recvmsg and sendmsg) by a process.
func ReadsAndWrites(pid int) (int64, error) {
	reads, err := procValue(pid, "io", "syscr")
	if err != nil {
		return 0, err
	}
	writes, err := procValue(pid, "io", "syscw")
	return reads + writes, err
}

func procValue(pid int, file, name string) (int64, error) {
	path := fmt.Sprintf("/proc/%d/%s", pid, file)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	value, err := parseValue(string(text), name)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return value, nil
}

// parseValue returns the number in a line such as "Rss:  1234 kB" or "syscr: 12".
func parseValue(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		rest, found := strings.CutPrefix(line, name+":")
		if !found {
			continue
		}
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			break
		}
		return strconv.ParseInt(fields[0], 10, 64)
	}
	return 0, fmt.Errorf("%s has no value", name)
}

// SetAffinity limits a thread to these CPUs; thread 0 is the calling thread. An empty
// list is no limit.
func SetAffinity(thread int, cpus []int) error {
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(thread, &set); err != nil {
		return fmt.Errorf("sched_setaffinity: %w", err)
	}
	return nil
}

// Pause sleeps in the kernel. Go's timers may be a millisecond late, and the measured
// latencies are a tenth of that.
func Pause(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // a signal may end it early; callers accept that
}

// Wait waits for d. It returns an error if ctx ends first.
func Wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
