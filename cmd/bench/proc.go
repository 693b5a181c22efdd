//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime returns the CPU time of all threads of a process, including ended threads.
// PID 0 is this process. The clock has a resolution of nanoseconds; /proc/PID/stat
// has hundredths of a second.
func cpuTime(pid int) (time.Duration, error) {
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

// residentBytes returns the resident memory of a process. Other counters of the
// kernel, as in /proc/PID/statm, may lag behind.
func residentBytes(pid int) (int64, error) {
	kib, err := procValue(pid, "smaps_rollup", "Rss")
	return kib << 10, err
}

// readsAndWrites counts the calls of read, write and their variants (readv, pread,
// sendfile and so on, but not recvmsg and sendmsg) by a process.
func readsAndWrites(pid int) (int64, error) {
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

// machineTime returns the time for which this machine's CPUs were in use by processes,
// the kernel, and other virtual machines, summed over all CPUs.
func machineTime() (time.Duration, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	t, err := parseStat(string(text))
	if err != nil {
		return 0, fmt.Errorf("/proc/stat: %w", err)
	}
	return t, nil
}

// tick is the unit of /proc/stat, USER_HZ, which is 100 on every platform.
const tick = 10 * time.Millisecond

// parseStat reads "cpu user nice system idle iowait irq softirq steal …", the
// first line (proc(5)).
func parseStat(text string) (time.Duration, error) {
	const idle, iowait, steal = 4, 5, 8
	line, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(line)
	if len(fields) <= steal || fields[0] != "cpu" {
		return 0, fmt.Errorf("no CPU times in %q", line)
	}
	var sum time.Duration
	for i, field := range fields[1 : steal+1] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		if column := i + 1; column != idle && column != iowait {
			sum += time.Duration(n) * tick
		}
	}
	return sum, nil
}

// share pins the load to half of the CPUs and returns the other CPUs, for the servers.
// On separate CPUs, the CPU times show whether the load or the server is the
// bottleneck. share returns nil on a machine with one CPU.
func share() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("sched_getaffinity: %w", err)
	}
	cpus := members(set)
	if len(cpus) < 2 {
		return nil, nil
	}
	servers, load := cpus[:len(cpus)/2], cpus[len(cpus)/2:]
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	// A new thread inherits the CPUs of the thread that creates it.
	for _, task := range tasks {
		id, err := strconv.Atoi(task.Name())
		if err != nil {
			return nil, err
		}
		if err := setAffinity(id, load); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, err
		}
	}
	// One more than the CPUs, for the thread that sleeps in the kernel; see [pause].
	runtime.GOMAXPROCS(len(load) + 1)
	return servers, nil
}

// setAffinity limits a thread to these CPUs; thread 0 is the calling thread. An empty
// list is no limit.
func setAffinity(thread int, cpus []int) error {
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

func members(set unix.CPUSet) []int {
	var list []int
	for cpu := 0; len(list) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			list = append(list, cpu)
		}
	}
	return list
}

// pause sleeps in the kernel. Go's timers may be a millisecond late, and the measured
// latencies are a tenth of that.
func pause(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // a signal may end it early; callers accept that
}
