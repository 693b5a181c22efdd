package certs

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/rs/zerolog"
)

// storageFault is the key of the storage in faults. Names are never empty.
const storageFault = ""

// faults keeps the last error of each name, and that of the storage.
type faults struct {
	log zerolog.Logger

	mu     sync.Mutex
	last   map[string]*explained // by name or storageFault; guarded by mu
	failed uint64                // errors since the start; guarded by mu
}

func newFaults(log zerolog.Logger) *faults {
	return &faults{log: log, last: make(map[string]*explained)}
}

// set records a fault. It logs the fault unless the last fault of the name has the
// same kind, because every retry reports the same fault.
func (f *faults) set(name string, fault *explained) {
	f.mu.Lock()
	f.failed++
	last := f.last[name]
	f.last[name] = fault
	f.mu.Unlock()
	if last == nil || last.kind != fault.kind {
		f.log.Warn().Err(fault).Msg("certificate not obtained")
	}
}

// clear removes the fault of name.
func (f *faults) clear(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.last, name)
}

// has reports whether name has a fault.
func (f *faults) has(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last[name] != nil
}

// first returns the fault to fix first, or nil. The storage comes first, then the
// names in order.
func (f *faults) first(names []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range append([]string{storageFault}, names...) {
		if fault := f.last[name]; fault != nil {
			return fault
		}
	}
	return nil
}

// count returns the number of errors since the start.
func (f *faults) count() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}

// onEvent handles certmagic's events.
func (a *ACME) onEvent(ctx context.Context, event string, data map[string]any) error {
	switch event {
	case "cert_failed":
		name := fmt.Sprint(data["identifier"])
		if err, ok := data["error"].(error); ok && !errors.Is(err, context.Canceled) {
			fault := explain(name, err)
			fault.words += resolved(ctx, name, err, a.config.Lookup)
			a.faults.set(name, fault)
		}
	case "cert_obtained":
		a.faults.clear(fmt.Sprint(data["identifier"]))
		if renewal, _ := data["renewal"].(bool); renewal {
			a.renewed.Add(1)
		}
		a.config.Log.Info().Any("name", data["identifier"]).Any("renewal", data["renewal"]).Msg("certificate obtained")
	case "cached_managed_cert":
		names, _ := data["sans"].([]string)
		for _, name := range names {
			if name == a.config.Names[0] {
				a.once.Do(func() { close(a.ready) })
			}
		}
	}
	return nil
}

// onWrite handles the result of each write of the storage. certmagic only logs a
// write that failed.
func (a *ACME) onWrite(err error) {
	if err == nil {
		a.faults.clear(storageFault)
		return
	}
	a.faults.set(storageFault, notStored(a.config.Dir, err))
}
