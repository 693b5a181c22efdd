package node

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/admin"
	"derpd/internal/testkit"
)

// connectAs connects with a node key, and returns why the relay refuses it, or
// nil.
func connectAs(t *testing.T, r *tailcfg.DERPRegion, private key.NodePrivate) error {
	t.Helper()
	c := testkit.RegionClient(t, r, private)
	defer func() { _ = c.Close() }()
	return testkit.Admitted(t, c)
}

// serveSocket serves HTTP on a unix socket until the test ends.
func serveSocket(t *testing.T, path string, handler http.Handler) {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: ln, Config: &http.Server{Handler: handler}}
	server.Start()
	t.Cleanup(server.Close)
}

// answer makes a handler with the same response to every request.
func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// running is the status of a tailscaled that has its network map.
const running = `{"BackendState":"Running","Self":{"InNetworkMap":true,"Online":true}}`

// localAPI answers like tailscaled's LocalAPI (ipn/localapi, serveWhoIs and
// serveStatus).
func localAPI(status string, isMember func(key.NodePublic) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/localapi/v0/status" {
			answer(http.StatusOK, status)(w, r)
			return
		}
		var k key.NodePublic
		if r.URL.Path != "/localapi/v0/whois" || k.UnmarshalText([]byte(r.FormValue("addr"))) != nil {
			http.Error(w, "invalid 'addr' parameter", http.StatusBadRequest)
			return
		}
		if !isMember(k) {
			http.Error(w, "no match for IP:port", http.StatusNotFound)
			return
		}
		answer(http.StatusOK, `{"Node":{"ID":1},"UserProfile":{"ID":1}}`)(w, r)
	})
}

// TestAdmissionSources connects a member and a stranger to a relay with each
// kind of source. Only the member is admitted.
func TestAdmissionSources(t *testing.T) {
	member, stranger := key.NewNode(), key.NewNode()
	isMember := func(k key.NodePublic) bool { return k == member.Public() }

	admissionURL := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var question tailcfg.DERPAdmitClientRequest
		if err := json.NewDecoder(r.Body).Decode(&question); err != nil || !question.Source.IsLoopback() {
			t.Errorf("question %+v, %v", question, err)
		}
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: isMember(question.NodePublic)})
	}))
	t.Cleanup(admissionURL.Close)

	socket := filepath.Join(t.TempDir(), "tailscaled.sock")
	serveSocket(t, socket, localAPI(running, isMember))

	file := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(file, []byte("# mine\n"+member.Public().String()+" # laptop\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, env := range map[string][]string{
		"keys":              {"DERP_ALLOW_KEYS=" + member.Public().String()},
		"key file":          {"DERP_ALLOW_KEYS=" + file},
		"key file by _FILE": {"DERP_ALLOW_KEYS_FILE=" + file},
		"url":               {"DERP_VERIFY_CLIENT_URL=" + admissionURL.URL + "/verify"},
		"tailscaled auto":   {"DERP_TAILSCALED_SOCKET=" + socket},
		"tailscaled true":   {"DERP_VERIFY_CLIENTS=true", "DERP_TAILSCALED_SOCKET=" + socket},
		"any may say yes":   {"DERP_ALLOW_KEYS=" + key.NewNode().Public().String(), "DERP_VERIFY_CLIENT_URL=" + admissionURL.URL},
	} {
		t.Run(name, func(t *testing.T) {
			n := begin(t, testkit.Environ(t, env...))
			r := region(t, parsePolicy(t, n.printed))
			if err := connectAs(t, r, member); err != nil {
				t.Errorf("the member is refused: %v", err)
			}
			if err := connectAs(t, r, stranger); err == nil {
				t.Error("the stranger is admitted")
			}
			if strings.Contains(string(n.printed), "open") {
				t.Error("the map calls a closed relay open")
			}
			// The relay must admit its own self-check.
			if report := n.health.Report(t.Context()); !report.Ready {
				t.Error(report)
			}
		})
	}
}

// TestAdmissionFailsClosed asserts that a source with a fault admits no node,
// and does not keep another source from admitting one.
func TestAdmissionFailsClosed(t *testing.T) {
	member, other := key.NewNode(), key.NewNode()
	for name, handler := range map[string]http.HandlerFunc{
		"500":            answer(http.StatusInternalServerError, ""),
		"502 with a yes": answer(http.StatusBadGateway, `{"Allow":true}`),
		"a login page":   answer(http.StatusOK, "<html>Sign in</html>"),
		"cut off":        answer(http.StatusOK, `{"Allow":tr`),
		"empty object":   answer(http.StatusOK, `{}`),
		"null":           answer(http.StatusOK, `{"Allow":null}`),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		},
		"a hang": func(_ http.ResponseWriter, r *http.Request) {
			// net/http sees the end of the connection only after
			// the body is read.
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(handler)
			t.Cleanup(server.Close)
			n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+server.URL, "DERP_ALLOW_KEYS="+member.Public().String()))
			r := region(t, parsePolicy(t, n.printed))
			if err := connectAs(t, r, other); err == nil {
				t.Error("admitted without a clear yes")
			}
			if err := connectAs(t, r, member); err != nil {
				t.Errorf("a node that another source knows is refused: %v", err)
			}
			if report := n.health.Report(t.Context()); !strings.Contains(report.String(), "warn admission: 1 of 2 sources need attention: url http://127.0.0.1") {
				t.Errorf("health does not report the fault: %s", report)
			}
		})
	}
	t.Run("tailscaled is not there", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "tailscaled.sock")
		n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENTS=true", "DERP_TAILSCALED_SOCKET="+socket))
		r := region(t, parsePolicy(t, n.printed))
		if err := connectAs(t, r, other); err == nil {
			t.Error("admitted although no tailscaled runs")
		}
		serveSocket(t, socket, answer(http.StatusOK, `{"Node":{"ID":1},"BackendState":"Running","Self":{"InNetworkMap":true,"Online":true}}`))
		if err := connectAs(t, r, other); err != nil {
			t.Errorf("refused although tailscaled runs: %v", err)
		}
	})
}

// TestKeyFileIsReadAgain changes the key file of a running relay. A good file
// takes effect; an empty or damaged one leaves the last good list in force.
func TestKeyFileIsReadAgain(t *testing.T) {
	first, second := key.NewNode(), key.NewNode()
	file := filepath.Join(t.TempDir(), "keys")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(first.Public().String())
	n := begin(t, testkit.Environ(t, "DERP_ALLOW_KEYS="+file))
	r := region(t, parsePolicy(t, n.printed))
	if err := connectAs(t, r, second); err == nil {
		t.Error("a node that is not in the file is admitted")
	}
	write(first.Public().String() + "\n" + second.Public().String() + "\n")
	testkit.Until(t, "a node that was added is admitted", func() bool { return connectAs(t, r, second) == nil })
	for _, broken := range []string{"", "nodekey:123", "# nothing\n"} {
		write(broken)
		testkit.Until(t, "health reports the damaged file", func() bool {
			return strings.Contains(n.health.Report(t.Context()).String(), "the last good list of 2 keys stays in force")
		})
		if err := connectAs(t, r, first); err != nil {
			t.Errorf("the file became %q, and a known node is refused: %v", broken, err)
		}
		write(first.Public().String() + "\n" + second.Public().String() + "\n")
		testkit.Until(t, "health reports the good file", func() bool {
			return strings.Contains(n.health.Report(t.Context()).String(), "ok   admission: keys "+file)
		})
	}
}

// TestRevocation removes a connected node from its source. The relay
// disconnects that node alone, and refuses it afterwards.
func TestRevocation(t *testing.T) {
	member, removed := key.NewNode(), key.NewNode()
	for name, revoke := range map[string]func(t *testing.T) (env []string, remove func()){
		"key file": func(t *testing.T) ([]string, func()) {
			file := filepath.Join(t.TempDir(), "keys")
			write := func(keys ...key.NodePrivate) {
				text := ""
				for _, k := range keys {
					text += k.Public().String() + "\n"
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(member, removed)
			return []string{"DERP_ALLOW_KEYS=" + file, "DERP_VERIFY_INTERVAL=1h"}, func() { write(member) }
		},
		"url": func(t *testing.T) ([]string, func()) {
			var isRemoved atomic.Bool
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var question tailcfg.DERPAdmitClientRequest
				_ = json.NewDecoder(r.Body).Decode(&question)
				allow := question.NodePublic == member.Public() || question.NodePublic == removed.Public() && !isRemoved.Load()
				_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: allow})
			}))
			t.Cleanup(server.Close)
			return []string{"DERP_VERIFY_CLIENT_URL=" + server.URL, "DERP_VERIFY_INTERVAL=1s"}, func() { isRemoved.Store(true) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			env, remove := revoke(t)
			n := begin(t, testkit.Environ(t, env...))
			r := region(t, parsePolicy(t, n.printed))
			stays, leaves := testkit.RegionClient(t, r, member), testkit.RegionClient(t, r, removed)
			for _, c := range []*derphttp.Client{stays, leaves} {
				testkit.MustAdmit(t, c)
			}
			testkit.Exchange(t, stays, leaves)
			testkit.Until(t, "the relay lists both", func() bool { return len(n.connected()) == 2 })
			start := time.Now()
			remove()
			for {
				if _, err := leaves.Recv(); err != nil {
					break
				}
			}
			t.Logf("disconnected after %s", time.Since(start).Round(time.Millisecond))
			if err := connectAs(t, r, removed); err == nil {
				t.Error("the node came back")
			}
			other := testkit.RegionClient(t, r, member)
			if err := testkit.Admitted(t, other); err != nil {
				t.Error(err)
			}
			if counts := n.gate.Load().Counts(); counts.Disconnected != 1 {
				t.Errorf("counted %+v, want one disconnected", counts)
			}
			if _, ok := n.connected()[member.Public()]; !ok {
				t.Error("the member was disconnected too")
			}
		})
	}
}

// TestFailOpen asserts that DERP_VERIFY_CLIENT_URL_FAIL_OPEN admits nodes while
// the URL cannot be reached, but not after an error of its server.
func TestFailOpen(t *testing.T) {
	broken := httptest.NewServer(answer(http.StatusInternalServerError, ""))
	t.Cleanup(broken.Close)
	for target, want := range map[string]bool{"http://127.0.0.1:1/verify": true, broken.URL: false} {
		n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+target, "DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true"))
		stranger := key.NewNode()
		err := connectAs(t, region(t, parsePolicy(t, n.printed)), stranger)
		if (err == nil) != want {
			t.Errorf("%s: %v, want admitted %t", target, err, want)
		}
		if warnings := strings.Join(n.config.Warnings, "\n"); !strings.Contains(warnings, "admits anybody") {
			t.Errorf("no warning in %q", warnings)
		}
	}
}

// TestNoGrace asserts that DERP_VERIFY_GRACE is the grace: with 0 a node that was
// admitted a moment ago is refused once its source is unavailable.
func TestNoGrace(t *testing.T) {
	for grace, want := range map[string]bool{"0": false, "1h": true} {
		var broken atomic.Bool
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if broken.Load() {
				answer(http.StatusInternalServerError, "")(w, r)
				return
			}
			answer(http.StatusOK, `{"Allow":true}`)(w, r)
		}))
		t.Cleanup(server.Close)
		n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENT_URL="+server.URL, "DERP_VERIFY_GRACE="+grace, "DERP_VERIFY_INTERVAL=2h"))
		r, member := region(t, parsePolicy(t, n.printed)), key.NewNode()
		if err := connectAs(t, r, member); err != nil {
			t.Fatal(err)
		}
		broken.Store(true)
		if err := connectAs(t, r, member); (err == nil) != want {
			t.Errorf("grace %s: %v, want admitted %t", grace, err, want)
		}
		kept := strings.Contains(scrape(t, n), `derpd_admission_decisions_total{decision="kept"} 1`)
		if kept != want {
			t.Errorf("grace %s: counted as kept: %t, want %t", grace, kept, want)
		}
	}
}

// TestAdmissionIsReported compares the metrics and `derpd admit` with the
// decisions of the relay.
func TestAdmissionIsReported(t *testing.T) {
	member := key.NewNode()
	down := httptest.NewServer(answer(http.StatusInternalServerError, ""))
	t.Cleanup(down.Close)
	env := testkit.Environ(t, "DERP_ALLOW_KEYS="+member.Public().String(), "DERP_VERIFY_CLIENT_URL="+down.URL)
	n := begin(t, env)
	r := region(t, parsePolicy(t, n.printed))
	c := testkit.RegionClient(t, r, member)
	testkit.MustAdmit(t, c)
	if err := connectAs(t, r, key.NewNode()); err == nil {
		t.Fatal("a stranger is admitted")
	}
	testkit.Until(t, "the member is listed", func() bool { return len(n.connected()) == 1 })
	text := scrape(t, n)
	for _, want := range []string{
		`derpd_admission_decisions_total{decision="admitted"} 1`,
		`derpd_admission_decisions_total{decision="unavailable"} 1`,
		`derpd_admission_source_up{source="1 keys"} 1`,
		`derpd_admission_source_up{source="url ` + down.URL + `"} 0`,
		`derpd_admission_decisions_total{decision="refused"} 0`,
		`derpd_admission_decisions_total{decision="kept"} 0`,
		`derpd_admission_decisions_total{decision="disconnected"} 0`,
		fmt.Sprintf("derpd_certificate_not_after_timestamp_seconds %d\n", n.certs.Status().Leaf.NotAfter.Unix()),
		"derpd_stun_open 1\n", "derpd_self_check_failures_total 0\n", "derpd_certificate_reloads_total 0\n",
		"derpd_clients 1\n", "derpd_open 0\n", "derpd_certificate_failing 0\n", "derpd_certificate_reload_errors_total 0\n", "derp_packets_sent ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %q:\n%s", want, text)
		}
	}
	client := admin.Client{Addr: n.listeners.admin.Addr().String()}
	for node, want := range map[key.NodePublic]string{
		member.Public():        "1 keys: yes\nurl " + down.URL + ": unavailable: admission URL answered 500 Internal Server Error; the server or a proxy in front of it fails: see its log\nadmitted: a source says yes\n",
		key.NewNode().Public(): "1 keys: no\nurl " + down.URL + ": unavailable: admission URL answered 500 Internal Server Error; the server or a proxy in front of it fails: see its log\nrefused: no source says yes, and a source is unavailable\n",
	} {
		got, err := client.Admission(t.Context(), node)
		text, _, limit := strings.Cut(got.String(), "limit: ")
		if err != nil || text != want || got.Admitted != strings.Contains(want, "\nadmitted") || limit != got.Admitted {
			t.Errorf("derpd admit: %v\n%s\nwant\n%s", err, got, want)
		}
	}
}

// TestOpenRelaySaysSo asserts that the map and the health report of a relay
// without sources say that it is open.
func TestOpenRelaySaysSo(t *testing.T) {
	for _, env := range [][]string{nil, {"DERP_VERIFY_CLIENTS=false"}} {
		n := begin(t, testkit.Environ(t, env...))
		if err := connectAs(t, region(t, parsePolicy(t, n.printed)), key.NewNode()); err != nil {
			t.Error(err)
		}
		if !strings.Contains(string(n.printed), "This relay is open") {
			t.Error("the printed map does not say that the relay is open")
		}
		if report := n.health.Report(t.Context()); !report.Ready || !strings.Contains(report.String(), "warn admission: open") {
			t.Errorf("health does not say that the relay is open: %s", report)
		}
	}
}

// TestVerifyURLWithoutVerifyClients asserts that the admission URL is asked
// although DERP_VERIFY_CLIENTS is false, as with derper.
func TestVerifyURLWithoutVerifyClients(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		answer(http.StatusOK, `{"Allow":false}`)(w, r)
	}))
	t.Cleanup(server.Close)
	n := begin(t, testkit.Environ(t, "DERP_VERIFY_CLIENTS=false", "DERP_VERIFY_CLIENT_URL="+server.URL))
	if err := connectAs(t, region(t, parsePolicy(t, n.printed)), key.NewNode()); err == nil {
		t.Error("admitted against the answer of the URL")
	}
	if asked.Load() == 0 {
		t.Error("the URL was not asked")
	}
}
