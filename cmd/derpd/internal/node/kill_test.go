package node

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	"derpd/certs"
	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
	"derpd/relay"
)

// kills is the number of SIGKILLs in TestKilled, over all victims.
const kills = 100

// TestKilled kills relays at random moments. The next relay must be able to use
// the data directory, and no earlier file may be changed or lost.
func TestKilled(t *testing.T) {
	derpd := testkit.LinkAsDerpd(t)
	victims := []*victim{
		// Complete files below forget are removed, so that later kills
		// hit the relay while it makes them again.
		{name: "everything is new", forget: "."},
		{name: "a new certificate", forget: "certs/certificates"},
		{name: "renewal"},
		{name: "another renewal"},
		{name: "pinned", forget: ".", pinned: true},
	}
	for _, v := range victims {
		v.derpd, v.dir = derpd, t.TempDir()
		v.env = testkit.Environ(t, "DERP_DATA_DIR="+v.dir)
		if v.pinned {
			continue
		}
		authority := acmetest.Start(t)
		// certmagic renews a certificate so near its end at each start.
		authority.Validity = 4 * time.Minute
		httpPort := testkit.FreePort(t)
		authority.Validate(t, httpPort, 1)
		v.env = append(v.env, "DERP_DOMAIN=killed.example.com", "DERP_HTTP_PORT="+strconv.Itoa(httpPort), "DERP_ACME_CHALLENGES=http",
			"DERP_ACME_CA="+authority.Directory, "DERP_ACME_CA_ROOTS="+authority.RootsFile)
	}
	var running sync.WaitGroup
	for _, v := range victims {
		running.Go(func() {
			if err := v.killOften(t, kills/len(victims)); err != nil {
				t.Errorf("%s: %v", v.name, err)
			}
		})
	}
	running.Wait()
	for _, v := range victims {
		begun := time.Now()
		n := begin(t, v.env)
		t.Logf("%s: a start takes %s; complete certificates seen %d times, %d of them new; ready %s after the last kill", v.name, v.takes, v.whole, v.changes, time.Since(begun).Round(time.Millisecond))
		n.stop()
	}
}

// victim is a relay that is started and killed repeatedly.
type victim struct {
	name, derpd, dir string
	env              []string
	forget           string // path below dir, removed when the certificate is complete
	pinned           bool

	takes          time.Duration // duration of a first start until the certificate is complete
	whole, changes int
	seen           map[string]string // contents of files that must stay, by path
}

// killOften starts and kills the relay, and checks the files after each kill.
func (v *victim) killOften(t *testing.T, times int) error {
	v.seen = make(map[string]string)
	for i := range times {
		cmd := exec.CommandContext(t.Context(), v.derpd)
		cmd.Env = testkit.LastOfEach(v.env)
		begun := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		if i == 0 {
			v.awaitCertificate()
			v.takes = time.Since(begun)
			if !v.pinned {
				// The authority's validation takes up to a
				// second, at random.
				v.takes = max(v.takes, 1500*time.Millisecond)
			}
		} else {
			<-time.After(rand.N(v.takes * 3 / 2))
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := v.check(); err != nil {
			return fmt.Errorf("after kill %d: %w", i+1, err)
		}
		if v.forget != "" && v.certificate() != "" {
			if err := os.RemoveAll(filepath.Join(v.dir, v.forget)); err != nil {
				return err
			}
			if err := os.MkdirAll(v.dir, 0o700); err != nil {
				return err
			}
			for path := range v.seen {
				if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
					delete(v.seen, path)
				}
			}
		}
	}
	return nil
}

// awaitCertificate waits for the first certificate. The short interval makes the
// measured duration exact.
func (v *victim) awaitCertificate() {
	deadline, tick := time.After(testkit.Patience), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for v.certificate() == "" {
		select {
		case <-deadline:
			return // check reports the missing file
		case <-tick.C:
		}
	}
}

// certificate returns the path of the last file of a complete certificate, or
// an empty string.
func (v *victim) certificate() string {
	pattern := "certs/certificates/*/*/*.json" // certmagic writes it last
	if v.pinned {
		pattern = "certs/pinned.pem.pin"
	}
	found, _ := filepath.Glob(filepath.Join(v.dir, pattern))
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// unfinished matches temporary files that are renamed when they are complete,
// and the files with which certmagic tests its storage.
var unfinished = regexp.MustCompile(`^\d+$|\.tmp\d+$|^rw_test_\d+$`)

// check returns an error if a file is damaged, changed or lost.
func (v *victim) check() error {
	here := make(map[string]bool)
	err := filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || unfinished.MatchString(d.Name()) {
			return err
		}
		here[path] = true
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		content, fixed := string(data), true
		switch {
		case d.Name() == "node.key":
			_, err = relay.LoadKey(path)
		case d.Name() == "pinned.pem":
			_, err = certs.LoadPinned(certs.PinnedConfig{Path: path})
		case d.Name() == "pinned.pem.pin":
			_, err = os.Stat(strings.TrimSuffix(path, ".pin"))
		case strings.Contains(path, "/certificates/") && strings.HasSuffix(path, ".pem"):
			fixed = false
			_, err = tls.X509KeyPair(data, data)
			v.whole++
			if v.seen[path] != content {
				v.changes++
			}
		case strings.HasSuffix(path, ".json"):
			fixed = false
			if !json.Valid(data) {
				err = errors.New("no JSON")
			}
		case strings.Contains(path, "/users/") && strings.HasSuffix(path, ".key"):
			_, err = certmagic.PEMDecodePrivateKey(data)
		default:
			err = errors.New("unexpected file")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if before, ok := v.seen[path]; ok && fixed && before != content {
			return fmt.Errorf("%s has changed", path)
		}
		v.seen[path] = content
		return nil
	})
	for path := range v.seen {
		if !here[path] {
			err = errors.Join(err, fmt.Errorf("%s is gone", path))
		}
	}
	return err
}
