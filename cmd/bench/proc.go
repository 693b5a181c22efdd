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

	"derpd/internal/testrelay"
)

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
		if err := testrelay.SetAffinity(id, load); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, err
		}
	}
	// One more than the CPUs, for the thread that sleeps in the kernel; see [testrelay.Pause].
	runtime.GOMAXPROCS(len(load) + 1)
	return servers, nil
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
