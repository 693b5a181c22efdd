package node

import (
	"crypto/rand"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"go4.org/mem"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// members admits the keys of the row's clients.
func (w *world) members() string {
	return "DERP_ALLOW_KEYS=" + w.member.Public().String() + "," + w.friend.Public().String()
}

// verifier sets an admission URL that answers so.
func (w *world) verifier(status int, body string, header ...string) {
	w.Helper()
	w.verifierOf(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			rw.Header().Set(header[i], header[i+1])
		}
		rw.WriteHeader(status)
		_, _ = rw.Write([]byte(body))
	}))
}

func (w *world) verifierOf(handler http.Handler) {
	w.source = httptest.NewServer(handler)
	w.Cleanup(w.source.Close)
	w.set("DERP_VERIFY_CLIENT_URL=" + w.source.URL + "/verify")
}

// privateVerifier sets an admission URL with a certificate of an authority that this
// machine does not know. It returns the path of the authority's root.
func (w *world) privateVerifier() (roots string) {
	w.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte(`{"Allow":true}`)) }))
	root := rootNamed(w, "Private Root")
	c := w.leaf(root, forNames("127.0.0.1"))
	server.TLS = serving(c)
	server.StartTLS()
	w.Cleanup(server.Close)
	w.set("DERP_VERIFY_CLIENT_URL=" + server.URL + "/verify")
	return w.keep("roots.pem", testkit.ChainPEM(root))
}

// socket sets the path of tailscaled's socket.
func (w *world) socket() string {
	path := filepath.Join(w.dir, "tailscaled.sock")
	w.set("DERP_TAILSCALED_SOCKET=" + path)
	return path
}

// staleSocket leaves a socket on which nobody listens.
func (w *world) staleSocket() {
	w.Helper()
	ln, err := new(net.ListenConfig).Listen(w.Context(), "unix", w.socket())
	if err != nil {
		w.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		w.Fatal(err)
	}
}

// The texts that refused clients get; see relay/hold.go.
const (
	textRefused     = "this relay does not admit this node, whose key is ["
	textUnavailable = "this relay cannot ask who may use it now"
	textApp         = "this relay does not admit the app of this client"
)

// admissionRows are about who may connect.
func admissionRows() []situation {
	// The client gets the text, and the operator the cause.
	unavailable := func(name, words string, begin func(*world)) situation {
		return situation{name: name, begin: begin, client: textUnavailable, health: words, log: words, lacks: words}
	}
	return slices.Concat(socketRows(), []situation{
		{name: "a member", begin: func(w *world) { w.set(w.members()) }},
		{
			name:   "a stranger",
			begin:  func(w *world) { w.set("DERP_ALLOW_KEYS=" + w.friend.Public().String()) },
			client: textRefused, stranger: true,
		},
		{
			name: "a member of nothing",
			begin: func(w *world) {
				w.verifier(200, `{"Allow":false}`)
				w.set("DERP_ALLOW_KEYS=" + w.friend.Public().String())
			},
			client: textRefused, stranger: true,
		},
		{
			name:   "a stranger who gets no text",
			begin:  func(w *world) { w.set("DERP_ALLOW_KEYS="+w.friend.Public().String(), "DERP_TELL_CLIENTS=false") },
			client: "EOF", stranger: true,
		},
		{
			name: "an app that is not allowed",
			begin: func(w *world) {
				w.set("DERP_DISALLOW_APPS=unwanted")
				w.prepare = func(c *derphttp.Client) { c.AppName = "unwanted" }
			},
			client: textApp, stranger: true,
		},
		{name: "an admission URL that admits", begin: func(w *world) { w.verifier(200, `{"Allow":true}`) }},
		{
			name:   "an admission URL that refuses",
			begin:  func(w *world) { w.verifier(200, `{"Allow":false}`) },
			client: textRefused, stranger: true,
		},
		unavailable("an admission URL that answers with a page", "is a web page; is this Headscale's /verify?", func(w *world) { w.verifier(200, "<html>Welcome</html>") }),
		unavailable("an admission URL that answers nothing", "is empty; is this Headscale's /verify?", func(w *world) { w.verifier(200, "") }),
		unavailable("an admission URL that answers with text", "is no JSON object: ", func(w *world) { w.verifier(200, "OK") }),
		unavailable("an admission URL that is another page now", "leads to https://127.0.0.1:1/login; ", func(w *world) { w.verifier(302, "", "Location", "https://127.0.0.1:1/login?next=secret") }),
		unavailable("an admission URL that leads to another server", "leads to http://127.0.0.1:1/verify; a redirect to another server is not followed", func(w *world) {
			w.verifier(307, "", "Location", "http://127.0.0.1:1/verify")
		}),
		{
			name: "an admission URL that leads to another path",
			begin: func(w *world) {
				mux := http.NewServeMux()
				mux.HandleFunc("/verify", func(rw http.ResponseWriter, r *http.Request) {
					http.Redirect(rw, r, "/derp/verify", http.StatusTemporaryRedirect)
				})
				mux.HandleFunc("POST /derp/verify", func(rw http.ResponseWriter, r *http.Request) {
					var question tailcfg.DERPAdmitClientRequest
					err := json.NewDecoder(r.Body).Decode(&question)
					_ = json.NewEncoder(rw).Encode(tailcfg.DERPAdmitClientResponse{Allow: err == nil && !question.NodePublic.IsZero()})
				})
				w.verifierOf(mux)
			},
		},
		unavailable("an admission URL that is not there", "404 Not Found; the path is wrong, or Headscale is older than 0.24", func(w *world) { w.verifier(404, "") }),
		unavailable("an admission URL that fails", "500 Internal Server Error; the server or a proxy in front of it fails", func(w *world) { w.verifier(500, "") }),
		unavailable("an admission URL whose proxy fails", "502 Bad Gateway; the proxy in front of the server does not reach it", func(w *world) { w.verifier(502, "") }),
		unavailable("an admission URL that is down", "connection refused", func(w *world) { w.set("DERP_VERIFY_CLIENT_URL=http://127.0.0.1:1/verify") }),
		unavailable("an admission URL of a private authority", "set DERP_CA_ROOTS to its roots", func(w *world) { w.privateVerifier() }),
		{
			name:  "an admission URL of a private authority in DERP_CA_ROOTS",
			begin: func(w *world) { w.set("DERP_CA_ROOTS=" + w.privateVerifier()) },
		},
		{
			name: "one source that refuses, and one that is down",
			begin: func(w *world) {
				w.set("DERP_ALLOW_KEYS="+w.friend.Public().String(), "DERP_VERIFY_CLIENT_URL=http://127.0.0.1:1/verify")
			},
			client: textUnavailable, health: "connection refused", log: "connection refused", lacks: "connection refused",
		},
		{
			name: "an admission URL that is down, and admits anybody then by order",
			begin: func(w *world) {
				w.set("DERP_VERIFY_CLIENT_URL=http://127.0.0.1:1/verify", "DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true")
			},
			health: "anybody may connect, because DERP_VERIFY_CLIENT_URL_FAIL_OPEN is true", log: "connection refused",
		},
		{
			// Members stay admitted for DERP_VERIFY_GRACE.
			name:  "an admission URL that admitted, and goes down",
			begin: func(w *world) { w.verifier(200, `{"Allow":true}`) },
			then: func(w *world) {
				if e := w.look(); e.client != nil {
					w.Fatal(e.client)
				}
				w.source.Close()
			},
			health: "connection refused", log: "connection refused",
		},
		{
			name:   "too many strangers at the same time",
			begin:  func(w *world) { w.verifier(200, `{"Allow":false}`) },
			then:   (*world).flood,
			client: textRefused, health: "were refused without a question", stranger: true, // asked at its second attempt
		},
		{
			name: "a file of keys that becomes nonsense",
			begin: func(w *world) {
				w.set("DERP_ALLOW_KEYS=" + w.keysFile(w.member.Public().String()+"\n"+w.friend.Public().String()))
			},
			// The last good list stays in force.
			then:   func(w *world) { w.keysFile("nonsense") },
			health: "nonsense", log: "node keys not read",
		},
	})
}

// socketRows are about the socket of tailscaled.
func socketRows() []situation {
	notASocket := func(name, verify, words string, put func(path string) error) situation {
		return situation{
			name: name, start: words,
			begin: func(w *world) {
				w.set("DERP_VERIFY_CLIENTS=" + verify)
				if err := put(w.socket()); err != nil {
					w.Fatal(err)
				}
			},
		}
	}
	directory := func(path string) error { return os.Mkdir(path, 0o700) }
	file := func(path string) error { return os.WriteFile(path, nil, 0o600) }
	link := func(path string) error { return os.Symlink("/nonexistent/tailscaled.sock", path) }
	return []situation{
		notASocket("a directory at the socket's path", "auto", "is a directory, not a socket: Docker makes a directory when the host has no such socket", directory),
		notASocket("a directory at the socket's path that is required", "true", "is a directory, not a socket", directory),
		notASocket("a file at the socket's path", "auto", "is a file, not a socket", file),
		notASocket("a file at the socket's path that is required", "true", "is a file, not a socket", file),
		notASocket("a link at the socket's path that leads nowhere", "auto", "the link leads to /nonexistent/tailscaled.sock", link),
		{name: "no socket, and none is required", begin: func(w *world) { w.set("DERP_VERIFY_CLIENTS=auto") }},
		{
			name:  "a tailscaled that is not there",
			begin: func(w *world) { w.set("DERP_VERIFY_CLIENTS=true") },
			// Health says so before the first client comes.
			then:   func(w *world) { w.says("no such file") },
			client: textUnavailable, health: "start tailscaled; in a container, mount the directory", log: "no such file", lacks: "no such file",
		},
		{
			name:   "a socket on which nobody listens",
			begin:  (*world).staleSocket,
			then:   func(w *world) { w.says("connection refused") },
			client: textUnavailable, health: "not the socket, which tailscaled replaces; RuntimeDirectoryPreserve=yes", log: "connection refused", lacks: "connection refused",
		},
		{
			name: "a socket that may not be opened",
			begin: func(w *world) {
				if os.Getuid() == 0 {
					w.Skip("root may open every socket")
				}
				w.staleSocket()
				if err := syscall.Chmod(filepath.Join(w.dir, "tailscaled.sock"), 0); err != nil {
					w.Fatal(err)
				}
			},
			client: textUnavailable, health: "must be able to write to the socket", log: "permission denied", lacks: "permission denied",
		},
	}
}

// flood makes new strangers ask at ten times the rate of the limit, until the row ends.
func (w *world) flood() {
	stop := make(chan struct{})
	var running sync.WaitGroup
	w.Cleanup(running.Wait)
	w.Cleanup(func() { close(stop) })
	running.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			running.Go(func() {
				var raw [32]byte
				_, _ = rand.Read(raw[:])
				_ = w.node.gate.Load().Admit(w.Context(), key.NodePublicFromRaw32(mem.B(raw[:])), netip.Addr{})
			})
		}
	})
}

func (w *world) keysFile(content string) string {
	w.Helper()
	return w.keep("keys", []byte(content+"\n"))
}
