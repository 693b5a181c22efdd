//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"derpd/internal/testrelay"
)

// attackerNice is the priority of attackers. Real ones have CPUs of their own, and
// leave those of this machine to the server and to its members.
const attackerNice = "10"

// load is what an attacker does. Each kind uses the fields that it needs.
type load struct {
	Kind        string         `json:"kind"` // name in attackers
	HTTPS       netip.AddrPort `json:"https"`
	Certificate []byte         `json:"certificate"` // of the server, DER

	Connections int           `json:"connections,omitempty"` // in all
	AtOnce      int           `json:"atOnce,omitempty"`      // connections or requests under way
	Addresses   int           `json:"addresses,omitempty"`   // source addresses
	FirstAddr   int           `json:"firstAddr,omitempty"`   // number of the first one
	Rate        float64       `json:"rate,omitempty"`        // per second; 0 is all it can
	Hold        time.Duration `json:"hold,omitempty"`        // how long a connection stays open
	For         time.Duration `json:"for,omitempty"`         // longest time of the attack
	Stage       string        `json:"stage,omitempty"`       // where a connection falls silent
	Frame       int           `json:"frame,omitempty"`       // bytes that the first DERP frame claims
	Stopped     int           `json:"stopped,omitempty"`     // clients that read nothing
}

// attacker is a kind of attack. It counts what it does, and returns when the attack
// has ended or ctx ends.
type attacker func(ctx context.Context, l load, c *counts) error

// attackers are the kinds. A kind is registered by the init function of its file.
var attackers = map[string]attacker{}

// attackerAddr returns the source address of an attacker.
func attackerAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(1 + i/62500), byte(i / 250 % 250), byte(1 + i%250)})
}

// from returns the source address of connection i.
func (l load) from(i int) netip.Addr { return attackerAddr(l.FirstAddr + i%max(1, l.Addresses)) }

// counts are named counters.
type counts struct {
	mu     sync.Mutex
	values map[string]int64 // guarded by mu
}

func (c *counts) add(name string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.values == nil {
		c.values = map[string]int64{}
	}
	c.values[name] += n
}

// highest raises a counter to n.
func (c *counts) highest(name string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.values == nil {
		c.values = map[string]int64{}
	}
	c.values[name] = max(c.values[name], n)
}

func (c *counts) snapshot() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.values)
}

// printEvery is the time between two prints of an attacker's counters.
const printEvery = 200 * time.Millisecond

// runAttack is the process of an attacker. It prints its counters, one line of JSON
// each time.
func runAttack(ctx context.Context, argument string, stdout io.Writer) error {
	var l load
	if err := json.Unmarshal([]byte(argument), &l); err != nil {
		return err
	}
	attack, ok := attackers[l.Kind]
	if !ok {
		return fmt.Errorf("no attack has the name %q", l.Kind)
	}
	if l.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.For)
		defer cancel()
	}
	var c counts
	out := json.NewEncoder(stdout)
	var printer sync.WaitGroup
	ended, end := context.WithCancel(context.Background())
	printer.Go(func() {
		pace(ended, printEvery, printEvery, func(time.Time) error { return out.Encode(c.snapshot()) })
	})
	err := attack(ctx, l, &c)
	end()
	printer.Wait()
	if err != nil && ctx.Err() == nil {
		return err
	}
	return out.Encode(c.snapshot())
}

// assault is an attacker's process.
type assault struct {
	begun time.Time
	end   func()
	done  chan struct{} // closed when the process has ended

	mu     sync.Mutex
	values map[string]int64 // as last printed; guarded by mu
	ended  time.Time        // of the process; guarded by mu
	err    error            // guarded by mu
}

// attack starts an attacker in a process of its own. It ends with the row, or before
// with stop.
func (l *lab) attack(ctx context.Context, r *relay, what load) (*assault, error) {
	what.HTTPS, what.Certificate = r.HTTPS, l.certificate.Raw
	ctx, cancel := context.WithCancel(ctx)
	command, err := itself(ctx, []string{"nice", "-n", attackerNice}, modeAttack, what)
	if err != nil {
		cancel()
		return nil, err
	}
	a := &assault{begun: time.Now(), end: cancel, done: make(chan struct{})}
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = 5 * time.Second
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// An attacker uses one CPU at most.
	command.Env = append(os.Environ(), "GOMAXPROCS=1")
	command.Stderr = l.progress
	reader, writer, err := os.Pipe()
	if err != nil {
		cancel()
		return nil, err
	}
	command.Stdout = writer
	ended, err := testrelay.StartOn(nil, command)
	_ = writer.Close()
	if err != nil {
		cancel()
		_ = reader.Close()
		return nil, fmt.Errorf("starting an attacker: %w", err)
	}
	go func() {
		defer close(a.done)
		defer func() { _ = reader.Close() }()
		lines := bufio.NewScanner(reader)
		for lines.Scan() {
			var values map[string]int64
			if json.Unmarshal(lines.Bytes(), &values) == nil {
				a.mu.Lock()
				a.values = values
				a.mu.Unlock()
			}
		}
		<-ended
		a.mu.Lock()
		defer a.mu.Unlock()
		a.ended = time.Now()
		if !command.ProcessState.Success() && ctx.Err() == nil {
			a.err = fmt.Errorf("the attacker %q ended with %s", what.Kind, command.ProcessState)
		}
	}()
	l.onClose(func() { _, _ = a.stop() })
	return a, nil
}

// count returns a counter of the attacker as it was last printed.
func (a *assault) count(name string) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.values[name]
}

// tally is the result of an attacker.
type tally struct {
	counts map[string]int64
	took   time.Duration
}

// perSecond returns the rate of a counter over the whole attack.
func (t tally) perSecond(name string) float64 { return float64(t.counts[name]) / t.took.Seconds() }

// stop ends the attacker, and returns its counters.
func (a *assault) stop() (tally, error) {
	a.end()
	return a.wait(context.Background())
}

// wait waits until the attacker ends by itself.
func (a *assault) wait(ctx context.Context) (tally, error) {
	select {
	case <-a.done:
	case <-ctx.Done():
		return tally{}, errors.Join(ctx.Err(), errors.New("waiting for an attacker"))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return tally{a.values, a.ended.Sub(a.begun)}, a.err
}
