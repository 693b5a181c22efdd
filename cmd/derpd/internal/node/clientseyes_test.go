package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
)

// situation is a row of TestClientsEyes: a relay as people run it, and what a client,
// health, the log and the map say about it.
//
// The test requires of every row that they agree: a relay that is ready serves the
// client, and a relay that is not ready fails it. Rows name only their own words.
type situation struct {
	name string

	// begin makes the files of the situation and sets its environment, before the
	// relay starts.
	begin func(w *world)

	// then changes the situation once the relay is ready. The rest of the row is
	// about the time after it.
	then func(w *world)

	// start is a part of the error with which the relay refuses to start; empty
	// if it starts.
	start string

	// mend does what that error says. The relay then starts, and the rest of the
	// row is about the time after it. It is nil if the row ends with the error.
	mend func(w *world, err error)

	// client is a part of the client's error; empty if it exchanges packets.
	client string

	// health is a part of the cause if the relay is not ready, or of a warning if
	// it is ready. It is empty for a relay without a cause and without warnings
	// about more than its openness.
	health string

	// log and note are a part of a line of the log of level warn or error, and
	// of a comment of the map; empty for no requirement.
	log, note string

	// lacks allows a relay to be ready though the client fails, because the relay
	// cannot know what this client lacks, such as the root of a private authority.
	// Health must name it in a warning.
	lacks string

	// stranger allows the same, because the relay must refuse the client.
	stranger bool
}

// world is where a situation happens.
type world struct {
	*testing.T
	dir string // certificates and other files
	env []string

	// machine are the roots of the relay's machine; nil for publicRoot alone.
	machine *x509.CertPool

	// client are roots that the client has beside publicRoot.
	client *x509.CertPool

	// prepare changes the client before it connects; nil for none. member is the
	// client's key.
	prepare func(*derphttp.Client)
	member  key.NodePrivate

	// friend is the other client's key.
	friend key.NodePrivate

	// bound runs after the sockets are bound; see begin.
	bound func(*Node)

	source *httptest.Server // of admission; nil for none

	node *Node // nil before the start
	log  *logBuffer
}

// anyError is a situation's client that fails with any error.
const anyError = "*"

const eyesName = "derp.example.com"

func newWorld(t *testing.T) *world {
	t.Helper()
	return &world{
		T: t, dir: t.TempDir(), log: new(logBuffer), member: key.NewNode(), friend: key.NewNode(), client: x509.NewCertPool(),
		env: []string{"DERP_DOMAIN=" + eyesName, "DERP_CERT_MODE=pinned"},
	}
}

// set adds to the environment.
func (w *world) set(pairs ...string) { w.env = append(w.env, pairs...) }

// manual sets mode manual with the files of [world.replace].
func (w *world) manual(chain ...*tls.Certificate) {
	w.Helper()
	w.set("DERP_CERT_MODE=manual", "DERP_CERT_DIR="+w.dir)
	w.replace(chain...)
}

// replace writes a chain and the key of its first certificate.
func (w *world) replace(chain ...*tls.Certificate) {
	w.Helper()
	base := filepath.Join(w.dir, eyesName)
	testkit.WritePair(w, base+".crt", base+".key", chain...)
}

// experience is what a client, health, the log and the map say.
type experience struct {
	client error
	report healthz.Report
	log    []string // lines of level warn or error
	notes  string
}

// says returns the cause, and the details that need attention.
func (e experience) says() string {
	said := e.report.Cause
	for _, c := range e.report.Checks {
		if c.Level != healthz.OK && !strings.HasPrefix(c.Detail, "open: ") {
			said += "\n" + c.Name + ": " + c.Detail
		}
	}
	return said
}

// look is one look at everything, by the printed map.
func (w *world) look() (e experience) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), testkit.Patience)
	defer cancel()
	ask := admin.Client{Addr: w.node.listeners.admin.Addr().String()}
	printed, err := ask.Map(ctx, "json")
	if err != nil {
		w.Fatal(err)
	}
	var m tailcfg.DERPMap
	if err := json.Unmarshal(printed, &m); err != nil {
		w.Fatal(err)
	}
	e.client = w.connect(region(w.T, &m))
	e.report = w.node.health.Report(ctx)
	commented, err := ask.Map(ctx, "headscale")
	if err != nil {
		w.Fatal(err)
	}
	for line := range strings.Lines(string(commented)) {
		if strings.HasPrefix(line, "#") {
			e.notes += line
		}
	}
	for line := range strings.Lines(w.log.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			w.Fatal(err)
		}
		if fields["level"] == "warn" || fields["level"] == "error" {
			e.log = append(e.log, fmt.Sprintln(fields))
		}
	}
	return e
}

// connect exchanges packets between two clients of the region.
func (w *world) connect(r *tailcfg.DERPRegion) error {
	w.Helper()
	clients := []*derphttp.Client{testkit.RegionClient(w, r, w.member), testkit.RegionClient(w, r, w.friend)}
	defer func() {
		for _, c := range clients {
			_ = c.Close()
		}
	}()
	for _, c := range clients {
		// tlsdial of tailscale.com adds these roots to the system's.
		c.TLSConfig = testkit.Trust(w.client)
		if w.prepare != nil {
			w.prepare(c)
		}
		if err := testkit.Admitted(w, c); err != nil {
			return err
		}
	}
	testkit.Exchange(w, clients[0], clients[1])
	return nil
}

// run starts the relay. It returns the error of a start that fails.
func (w *world) run() error {
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(w, w.env...)))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	n, err := New(ctx, c, Options{Roots: w.machine, Map: io.Discard, Start: time.Now(), Log: zerolog.New(w.log).Level(zerolog.InfoLevel)})
	if err != nil {
		cancel()
		return err
	}
	if w.bound != nil {
		w.bound(n)
	}
	w.node = n
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := testkit.Receive(w, "the end of the relay", done); err != nil {
			w.Errorf("the relay ended with %v", err)
		}
	})
	return nil
}

// disagreement returns in what the experience is not that of the row, or nil.
func (s situation) disagreement(e experience) error {
	var bad []error
	want := func(what, part, got string) {
		if !strings.Contains(got, part) {
			bad = append(bad, fmt.Errorf("%s lacks %q", what, part))
		}
	}
	said := e.says()
	switch {
	case s.client == "" && e.client != nil:
		bad = append(bad, fmt.Errorf("the client fails with %w", e.client))
	case s.client != "" && e.client == nil:
		bad = append(bad, fmt.Errorf("the client connects, want %q", s.client))
	case s.client != anyError && s.client != "":
		want("the client's error", s.client, e.client.Error())
	}
	want("health", s.health, said)
	if s.health == "" && said != "" {
		bad = append(bad, errors.New("health complains"))
	}
	want("the map", s.note, e.notes)
	want("the log", s.log, strings.Join(e.log, ""))
	return errors.Join(bad...)
}

// contradiction returns what a client would hold against the relay, or nil. It is the
// same rule for every row.
func (s situation) contradiction(e experience) error {
	switch {
	case e.report.Ready && e.client != nil && s.lacks != "":
		if said := e.says(); !strings.Contains(said, s.lacks) {
			return fmt.Errorf("the client lacks %s, which health does not name: %s", s.lacks, said)
		}
	case e.report.Ready && e.client != nil && !s.stranger:
		return fmt.Errorf("the relay is ready, but the client fails with %w", e.client)
	case !e.report.Ready && e.client == nil:
		return fmt.Errorf("the relay is not ready (%s), but the client connects", e.report.Cause)
	case !e.report.Ready && e.client != nil && e.report.Cause == "":
		return errors.New("the relay is not ready, and health has no cause")
	}
	return e.wrongText()
}

// wrongText returns how the text that a refused client gets differs from what health
// says about admission, or nil.
func (e experience) wrongText() error {
	if e.client == nil {
		return nil
	}
	said := e.says()
	for text, attention := range map[string]string{
		"cannot ask who may use it":  "sources need attention",
		"too many new nodes":         "were refused without a question",
		"does not admit this node":   "",
		"does not admit the app":     "",
		"this relay is stopping":     "stopping",
		"certificate of this relay ": "certificate: ",
	} {
		if strings.Contains(e.client.Error(), text) && !strings.Contains(said, attention) {
			return fmt.Errorf("the client gets %w, but health does not say %q: %s", e.client, attention, said)
		}
	}
	return nil
}

// TestClientsEyes asserts for each situation that a relay is ready exactly if a client
// by its map can use it, and that health, log and map have the reason otherwise. A
// start that is refused is an answer as well, if it names the cause.
func TestClientsEyes(t *testing.T) {
	rows := slices.Concat(certificateRows(), fileRows(), pinRows(), acmeRows(t), admissionRows(), proxyRows())
	if len(rows) < 40 {
		t.Errorf("%d situations, want at least 40", len(rows))
	}
	// Most rows wait. T.Parallel would run only as many at a time as there are cores.
	var running errgroup.Group
	running.SetLimit(rowsAtOnce)
	for _, s := range rows {
		running.Go(func() error { t.Run(s.name, s.test); return nil })
	}
	_ = running.Wait()
}

// rowsAtOnce is the number of situations at the same time.
const rowsAtOnce = 12

func (s situation) test(t *testing.T) {
	w := newWorld(t)
	s.begin(w)
	err := w.run()
	switch {
	case s.start == "" && err != nil:
		t.Fatalf("the relay does not start: %v", err)
	case s.start != "" && (err == nil || !strings.Contains(err.Error(), s.start)):
		t.Fatalf("the start: %v, want %q", err, s.start)
	case s.start != "" && s.mend == nil:
		return
	case s.start != "":
		s.mend(w, err)
		if err := w.run(); err != nil {
			t.Fatalf("the start after %q: %v", s.start, err)
		}
	}
	if s.then != nil {
		testkit.Until(t, "the relay is ready", func() bool { return w.node.health.Report(t.Context()).Ready })
		s.then(w)
	}
	var e experience
	within(t, func() error {
		e = w.look()
		return errors.Join(s.disagreement(e), s.contradiction(e))
	}, func() string {
		return fmt.Sprintf("client: %v\nhealth: %s\nlog: %s\nmap:\n%s", e.client, e.report, e.log, e.notes)
	})
}

// eyesPatience is how long a situation may take to show. The self-check needs three
// failures in a row, and a timeout takes two seconds. A machine that is busy with other
// tests needs longer.
const eyesPatience = 2 * testkit.Patience

// lookEvery is the pause between two looks, which connect two clients each. Shorter
// pauses would keep the cores busy, and make other rows wait.
const lookEvery = 500 * time.Millisecond

// within retries attempt, and fails with its last error and the details.
func within(t *testing.T, attempt func() error, details func() string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), eyesPatience)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		err := attempt()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%v\n%s", err, details())
		case <-tick.C:
		}
	}
}
