package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"tailscale.com/atomicfile"

	"derpd/certs"
	"derpd/internal/filekind"
)

// changedWarning is how long health reports a changed pin: time for the operator to
// bring the new map to every client.
const changedWarning = 7 * day

// certName is a record of what the map says about the certificate. Clients of a map
// with another CertName fail.
type certName struct {
	CertName string    `json:"cert_name"`        // empty for the certificate of an authority
	Before   string    `json:"before,omitempty"` // the CertName before Changed
	Changed  time.Time `json:"changed,omitzero"` // zero if the CertName has never changed

	known bool // false before the first start
}

// next is the record after the map has got a CertName.
func (c certName) next(name string, now time.Time) certName {
	switch {
	case !c.known:
		return certName{CertName: name, known: true}
	case c.CertName == name:
		return c
	}
	return certName{CertName: name, Before: c.CertName, Changed: now.UTC().Truncate(time.Second), known: true}
}

// String describes the last change; empty if there was none.
func (c certName) String() string {
	if c.Changed.IsZero() {
		return ""
	}
	return fmt.Sprintf("the pin changed on %s (%s, before %s)",
		c.Changed.Format(time.DateOnly), certs.DescribeCertName(c.CertName), certs.DescribeCertName(c.Before))
}

// notes are the notes of the map about the last change.
func (c certName) notes() []string {
	if c.Changed.IsZero() {
		return nil
	}
	return []string{"Clients with an older map need this one: " + c.String() + "."}
}

// readCertName reads the record from a file. Without the file, nothing is known.
func readCertName(path string) (certName, error) {
	data, err := filekind.Regular(path, filekind.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return certName{}, nil
	}
	const absent = "-" // no CertName
	record := certName{CertName: absent, known: true}
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err == nil && record.CertName == absent {
		err = errors.New("it has no cert_name")
	}
	if err != nil {
		return certName{}, fmt.Errorf("reading the last pin from %s: %w", path, err)
	}
	return record, nil
}

func (c certName) write(path string) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return atomicfile.WriteFile(path, append(data, '\n'), 0o600)
}

// mapCert keeps the record, in a file too, so that a restart with another certificate
// is reported. A file that cannot be read or written stops nothing.
type mapCert struct {
	// changed receives a value when clients need a new map; nil before the start.
	changed chan struct{}

	mu     sync.Mutex
	record certName // guarded by mu
}

func (m *mapCert) get() certName {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.record
}

// warning is what health says about a change within changedWarning, or empty. A change
// in the future was recorded while the clock was wrong.
func (m *mapCert) warning(now time.Time) string {
	record := m.get()
	if record.Changed.IsZero() || now.Sub(record.Changed).Abs() > changedWarning {
		return ""
	}
	return record.String() + ": clients need the new map, which `derpd derpmap` prints"
}

// rememberCertName compares the certificate of this start with that of the last one.
// The operator restarts on purpose, so a change is only reported.
func (n *Node) rememberCertName() {
	record, err := readCertName(n.config.Storage.MapCertFile())
	if err != nil {
		n.log.Warn().Err(err).Msg("the last pin cannot be read, so a change since the last start is not reported")
	}
	name := ""
	if n.certs != nil {
		name = n.certs.Status().Pin
	}
	n.mapCert.changed = make(chan struct{}, 1)
	n.mapCert.mu.Lock()
	n.mapCert.record = record
	n.mapCert.mu.Unlock()
	n.setCertName(name)
}

// certNameChanged is called by the certificate manager. The map is printed again.
func (n *Node) certNameChanged(name string) {
	n.setCertName(name)
	n.health.Changed()
	select {
	case n.mapCert.changed <- struct{}{}:
	default: // the map will be printed
	}
}

// setCertName records the CertName of the map. It logs a change and writes the file.
func (n *Node) setCertName(name string) {
	m := &n.mapCert
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.record
	m.record = before.next(name, time.Now())
	if m.record == before {
		return
	}
	if before.known {
		n.log.Warn().Str("now", certs.DescribeCertName(name)).Str("before", certs.DescribeCertName(before.CertName)).
			Msg("the pin in the map has changed: every client needs the new map")
	}
	if err := m.record.write(n.config.Storage.MapCertFile()); err != nil {
		n.log.Warn().Err(err).Msg("the pin cannot be stored; the next start may not notice when the pin changes")
	}
}

// mapCertNotes are the notes of the map about a pin that has changed, or that would
// change with the certificate that waits.
func (n *Node) mapCertNotes() []string {
	notes := n.mapCert.get().notes()
	if n.certs == nil {
		return notes
	}
	if s := n.certs.Status(); s.Waiting != nil {
		notes = append(notes, "The certificate files have another certificate, which is not served yet and needs another map:",
			"run `derpd pin --accept "+certs.ShortHash(s.Waiting)+"` and paste the new map, or put the old files back.")
	}
	return notes
}

// acceptPin is the order of `derpd pin --accept`.
func (n *Node) acceptPin(hash string) error {
	if n.certs == nil {
		return certs.ErrNothingWaits
	}
	return n.certs.Accept(hash)
}
