package node

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
)

// members admits the keys of the row's clients.
func (w *world) members() string {
	return "DERP_ALLOW_KEYS=" + w.member.Public().String() + "," + w.friend.Public().String()
}

// verifier sets an admission URL that answers so.
func (w *world) verifier(status int, body string, header ...string) {
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			rw.Header().Set(header[i], header[i+1])
		}
		rw.WriteHeader(status)
		_, _ = rw.Write([]byte(body))
	}))
	w.Cleanup(server.Close)
	w.set("DERP_VERIFY_CLIENT_URL=" + server.URL + "/verify")
}

// admissionRows are about who may connect.
func admissionRows() []situation {
	return []situation{
		{name: "a member", begin: func(w *world) { w.set(w.members()) }},
		{
			name:   "a stranger",
			begin:  func(w *world) { w.set("DERP_ALLOW_KEYS=" + w.friend.Public().String()) },
			client: anyError, stranger: true,
		},
		{name: "an admission URL that admits", begin: func(w *world) { w.verifier(200, `{"Allow":true}`) }},
		{
			name:   "an admission URL that refuses",
			begin:  func(w *world) { w.verifier(200, `{"Allow":false}`) },
			client: anyError, stranger: true,
		},
		{
			name:   "an admission URL that answers with a page",
			begin:  func(w *world) { w.verifier(200, "<html>Welcome</html>") },
			client: anyError, health: "url http://127.0.0.1", log: "admission source unavailable", lacks: "sources need attention",
		},
		{
			name:   "an admission URL that is another page now",
			begin:  func(w *world) { w.verifier(302, "", "Location", "https://127.0.0.1:1/login") },
			client: anyError, health: "302 Found", log: "302 Found", lacks: "302 Found",
		},
		{
			name:   "an admission URL that fails",
			begin:  func(w *world) { w.verifier(502, "") },
			client: anyError, health: "502 Bad Gateway", log: "502 Bad Gateway", lacks: "502 Bad Gateway",
		},
		{
			name:   "an admission URL that is down",
			begin:  func(w *world) { w.set("DERP_VERIFY_CLIENT_URL=http://127.0.0.1:1/verify") },
			client: anyError, health: "connection refused", log: "connection refused", lacks: "connection refused",
		},
		{
			name:   "a tailscaled that is not there",
			begin:  func(w *world) { w.set("DERP_VERIFY_CLIENTS=true") },
			client: anyError, health: "no such file", log: "no such file", lacks: "no such file",
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
	}
}

func (w *world) keysFile(content string) string {
	w.Helper()
	path := filepath.Join(w.dir, "keys")
	if err := os.WriteFile(path, []byte(content+"\n"), 0o600); err != nil {
		w.Fatal(err)
	}
	return path
}
