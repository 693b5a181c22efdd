package node

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/certs"
	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/internal/testkit"
)

// TestAcceptedPin replaces self-signed files under a relay with clients. Clients of the
// old map work until the operator accepts the files, and clients of the new map
// afterwards. A restart remembers the change.
func TestAcceptedPin(t *testing.T) {
	dir, data := t.TempDir(), t.TempDir()
	replace := func() (pin, short string) {
		made := testkit.NewCertificate(t, testkit.Certificate{Names: []string{eyesName}, NotAfter: time.Now().AddDate(1, 0, 0)})
		testkit.WritePair(t, filepath.Join(dir, eyesName+".crt"), filepath.Join(dir, eyesName+".key"), made)
		return certs.Pin(made.Leaf), certs.ShortHash(made.Leaf)
	}
	env := testkit.Environ(t, "DERP_DOMAIN="+eyesName, "DERP_CERT_MODE=manual", "DERP_CERT_DIR="+dir, "DERP_DATA_DIR="+data)
	firstPin, firstShort := replace()
	n := begin(t, env)
	oldMap := region(t, parsePolicy(t, n.printed))
	ask := admin.Client{Addr: n.listeners.admin.Addr().String()}
	connects := func(n *testNode, r *tailcfg.DERPRegion) error {
		// A restart has other ports.
		node := *r.Nodes[0]
		node.DERPPort = port(n.listeners.https.Addr())
		return testkit.Admitted(t, testkit.RegionClient(t, &tailcfg.DERPRegion{RegionID: r.RegionID, Nodes: []*tailcfg.DERPNode{&node}}, key.NewNode()))
	}
	refuses := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "cert hash does not match") {
			t.Errorf("%s: %v, want a hash that does not match", what, err)
		}
	}
	connected, _ := exchangeOver(t, oldMap, nil)

	secondPin, secondShort := replace()
	testkit.Until(t, "the new files wait", func() bool { return n.certs.Status().Waiting != nil })
	if err := connects(n, oldMap); err != nil {
		t.Errorf("a client of the old map, before the new files are accepted: %v", err)
	}
	newMap := *oldMap.Nodes[0]
	newMap.CertName = secondPin
	refuses("a client of the new map, too early", connects(n, &tailcfg.DERPRegion{RegionID: 900, Nodes: []*tailcfg.DERPNode{&newMap}}))
	if _, ok := metricsText(n.Node)["gauge_derpd_pin_changed_timestamp_seconds"]; ok {
		t.Error("a change of the pin is counted before it happens")
	}

	if _, err := ask.AcceptPin(t.Context(), firstShort[:15]+"x", "policy"); err == nil || !strings.Contains(err.Error(), secondShort+", not ") {
		t.Errorf("another hash than announced: %v", err)
	}
	if _, err := ask.AcceptPin(t.Context(), "", "xml"); err == nil || n.certs.Status().Waiting == nil {
		t.Errorf("an unknown format: %v", err)
	}
	n.health.Report(t.Context()) // is used for a second, unless something changes
	text, err := ask.AcceptPin(t.Context(), "", "policy")
	if err != nil {
		t.Fatal(err)
	}
	health := n.health.Report(t.Context()).String()
	r := region(t, parsePolicy(t, text))
	if r.Nodes[0].CertName != secondPin {
		t.Errorf("the new map has %s, want %s", r.Nodes[0].CertName, secondPin)
	}
	exchangeOver(t, r, nil)
	refuses("a client of the old map, after the new files are accepted", connects(n, oldMap))
	// Connected clients stay.
	exchangeWith(t, connected, r)
	printed := testkit.Receive(t, "the new map on stdout", n.options.Map.(chanWriter))
	changed := "the pin changed on " + time.Now().UTC().Format(time.DateOnly) + " (pin " + secondShort + ", before pin " + firstShort + ")"
	for what, got := range map[string]string{"the answer": string(text), "stdout": string(printed), "health": health} {
		if !strings.Contains(got, changed) || what != "health" && !strings.Contains(got, secondPin) {
			t.Errorf("%s lacks %q:\n%s", what, changed, got)
		}
	}
	if got := metricsText(n.Node)["gauge_derpd_pin_changed_timestamp_seconds"]; got != fmt.Sprint(n.mapCert.get().Changed.Unix()) {
		t.Errorf("the metric is %q", got)
	}
	if _, err := ask.AcceptPin(t.Context(), "", "policy"); err == nil || !strings.Contains(err.Error(), "no certificate waits") {
		t.Errorf("accepted once more: %v", err)
	}

	n.stop()
	again := begin(t, env)
	if err := connects(again, r); err != nil {
		t.Errorf("a client of the new map after a restart: %v", err)
	}
	if got := again.health.Report(t.Context()).String(); !strings.Contains(got, changed) {
		t.Errorf("health after a restart lacks %q:\n%s", changed, got)
	}
	again.stop()

	thirdPin, thirdShort := replace()
	conf, err := config.Load(env)
	if err != nil {
		t.Fatal(err)
	}
	changed = "(pin " + thirdShort + ", before pin " + secondShort + ")"
	if stopped, err := StoppedMap(t.Context(), conf, "policy"); err != nil || !strings.Contains(string(stopped), changed) {
		t.Errorf("the map of the stopped relay lacks %q: %v\n%s", changed, err, stopped)
	}
	third := begin(t, env)
	r = region(t, parsePolicy(t, third.printed))
	if r.Nodes[0].CertName != thirdPin || !strings.Contains(string(third.printed), changed) {
		t.Errorf("the map after a restart with other files lacks %q:\n%s", changed, third.printed)
	}
	exchangeOver(t, r, nil)
	third.stop()
	record, err := readCertName(filepath.Join(data, "mapcert.json"))
	if err != nil || record.CertName != thirdPin || record.Before != secondPin || firstPin == secondPin {
		t.Errorf("the record is %+v, %v", record, err)
	}
}

// exchangeWith exchanges packets between a connected client and a new one of a region.
func exchangeWith(t *testing.T, connected testkit.Client, r *tailcfg.DERPRegion) {
	t.Helper()
	c := testkit.RegionClient(t, r, key.NewNode())
	testkit.MustAdmit(t, c)
	testkit.Exchange(t, connected, c)
}

// TestCertNameRecord asserts what a record says about a change, and for how long.
func TestCertNameRecord(t *testing.T) {
	now := time.Date(2026, 11, 28, 23, 59, 59, 1, time.UTC)
	pin := func(digit string) string { return "sha256-raw:" + strings.Repeat(digit, 64) }
	first := certName{}.next(pin("1"), now)
	if notes := first.notes(); first.String() != "" || notes != nil {
		t.Errorf("the first start says %q, %q", first, notes)
	}
	if same := first.next(pin("1"), now.Add(time.Hour)); same != first {
		t.Errorf("the same pin changes %+v to %+v", first, same)
	}
	second := first.next(pin("2"), now)
	const want = "the pin changed on 2026-11-28 (pin 2222222222222222, before pin 1111111111111111)"
	if second.String() != want || !slices.Equal(second.notes(), []string{"Clients with an older map need this one: " + want + "."}) {
		t.Errorf("%q, %q", second, second.notes())
	}
	if got, want := second.next("", now).String(), "the pin changed on 2026-11-28 (no pin, before pin 2222222222222222)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// A file with nothing in it counts as no pin.
	if unpinned := (certName{}).next("", now).next(pin("1"), now); unpinned.Changed.IsZero() {
		t.Error("a pin in place of none is no change")
	}
	m := mapCert{record: second}
	for after, says := range map[time.Duration]bool{0: true, 7*day - time.Minute: true, 7*day + time.Minute: false, -time.Hour: true, -365 * day: false} {
		if got := m.warning(now.Add(after)); (got != "") != says {
			t.Errorf("after %v health says %q", after, got)
		}
	}
}

// TestPinOfFiles asserts which files have a pin.
func TestPinOfFiles(t *testing.T) {
	w := newWorld(t)
	for name, tt := range map[string]struct {
		chain []*tls.Certificate
		err   string
	}{
		"self-signed":  {[]*tls.Certificate{w.leaf(nil)}, ""},
		"an authority": {w.chain(publicRoot), "is the certificate of an authority, so the map has no pin"},
	} {
		w.manual(tt.chain...)
		c, err := config.Load(testkit.Environ(t, w.env...))
		if err != nil {
			t.Fatal(err)
		}
		switch hash, until, err := Pin(c); {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: %v, want %q", name, err, tt.err)
		case tt.err == "" && (err != nil || hash != certs.Pin(tt.chain[0].Leaf) || !until.Equal(tt.chain[0].Leaf.NotAfter)):
			t.Errorf("%s: %s, %v, %v", name, hash, until, err)
		}
	}
}

// TestCertNameFileIsBroken asserts that a relay starts and serves with a record that can
// be neither read nor written, and logs both.
func TestCertNameFileIsBroken(t *testing.T) {
	for name, breakFile := range map[string]func(path string) error{
		"a directory": func(path string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o700) },
		"no JSON":     func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) },
		"no name":     func(path string) error { return os.WriteFile(path, []byte("{}"), 0o600) },
		"null":        func(path string) error { return os.WriteFile(path, []byte("null"), 0o600) },
		"huge":        func(path string) error { return os.WriteFile(path, make([]byte, 2<<20), 0o600) },
		"a pipe":      func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			data := t.TempDir()
			path := filepath.Join(data, "mapcert.json")
			if err := breakFile(path); err != nil {
				t.Fatal(err)
			}
			log := new(logBuffer)
			n := begin(t, testkit.Environ(t, "DERP_DATA_DIR="+data), func(n *Node) { n.log = zerolog.New(log) })
			exchangeOver(t, region(t, parsePolicy(t, n.printed)), nil)
			pin := n.certs.Status().Pin
			if got := n.mapCert.get(); got != (certName{CertName: pin, known: true}) {
				t.Errorf("the record is %+v", got)
			}
			// A change is known without the file.
			n.certNameChanged("")
			if got := n.mapCert.get(); got.Before != pin || got.Changed.IsZero() {
				t.Errorf("the record after a change is %+v", got)
			}
			if name == "a directory" || name == "a pipe" {
				if got := log.String(); strings.Count(got, "the pin cannot be stored") != 1 {
					t.Errorf("logged\n%s", got)
				}
				return
			}
			var onDisk certName
			if text, err := os.ReadFile(path); err != nil || json.Unmarshal(text, &onDisk) != nil || onDisk.Before != pin {
				t.Errorf("the file has %q, %v", text, err)
			}
		})
	}
}

// replacing is a manager whose certificate is replaced after the first look at it.
type replacing struct {
	certs.Manager
	before certs.Status
	looks  int
}

func (r *replacing) Status() certs.Status {
	if r.looks++; r.looks == 1 {
		return r.before
	}
	return r.Manager.Status()
}

// TestReplacedDuringAProbe asserts that the new certificate is not judged by the old
// pin.
func TestReplacedDuringAProbe(t *testing.T) {
	n := begin(t, testkit.Environ(t))
	other := testkit.SelfSigned(t, "127.0.0.1")
	log := new(logBuffer)
	fake := &Node{
		config: n.config, log: zerolog.New(log), listeners: n.listeners, relay: n.relay, probe: n.probe, eyes: newEyes(nil), health: n.health,
		certs: &replacing{Manager: n.certs, before: certs.Status{Leaf: other.Leaf, Chain: other.Certificate, Pin: certs.Pin(other.Leaf)}},
	}
	if _, err := fake.probeDERP(t.Context()); err == nil {
		t.Error("the probe accepts another certificate than it asked about")
	}
	if log.String() != "" {
		t.Errorf("the new certificate is judged by the old pin:\n%s", log.String())
	}
	if _, err := fake.probeDERP(t.Context()); err != nil {
		t.Errorf("the next probe: %v", err)
	}
}
