package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// The environment of the process is neither read nor changed.
func TestProcessEnvironment(t *testing.T) {
	t.Setenv("DERP_REGION_NAME", "of the process")
	t.Setenv("DERP_DOMAIN", "process.example.com")
	t.Setenv("DERP_ACME_EMAIL", "")
	t.Setenv("DERP_STUN_PORT", "") // a default must not become empty
	t.Setenv("HOME", "/home/of-the-process")
	t.Setenv("DOMAIN", "process.example.com")
	before := os.Environ()
	slices.Sort(before)
	dir := t.TempDir()
	file("kid", "kid")(t, dir)
	c, err := Load([]string{"DERP_DATA_DIR=" + dir, "DERP_DOMAIN=a.example.com", "DERP_ACME_EAB_KID_FILE=" + dir + "/kid", "DERP_ACME_EAB_KEY=c2Vj"})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "region", c.Region.Node.RegionName, "derpd")
	equal(t, "domains", c.Domains, []string{"a.example.com"})
	equal(t, "STUN", c.Listen.STUN, ":3478")
	equal(t, "key ID", c.Certificate.ACME.EABKeyID, "kid")
	after := os.Environ()
	slices.Sort(after)
	if !slices.Equal(before, after) {
		t.Errorf("the environment was %q, and is %q", before, after)
	}
	if value, isSet := os.LookupEnv("DERP_ACME_EMAIL"); !isSet || value != "" {
		t.Error("an empty variable of the process is lost")
	}
}

// Several nodes in one process have their own environments.
func TestConcurrentLoads(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			var environ []string
			want := "derpd, derpd"
			switch i % 3 {
			case 1:
				environ, want = []string{fmt.Sprintf("DERP_REGION_NAME=%d", i)}, fmt.Sprintf("derpd, %d", i)
			case 2:
				environ, want = []string{fmt.Sprintf("DERP_REGION_CODE=%d", i)}, fmt.Sprintf("%d, derpd", i)
			}
			for range 200 {
				e := readEnvironment(environ, new(problems))
				if got := e.RegionCode + ", " + e.RegionName; got != want {
					t.Errorf("%q: %s, want %s", environ, got, want)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestInjected(t *testing.T) {
	for _, tt := range []struct {
		pair    string
		ignored bool
	}{
		{"DERP_PORT=tcp://10.0.0.1:443", true},
		{"DERP_STUN_PORT=udp://10.0.0.1:3478", true},
		{"DERP_STUN_PORT=sctp://10.0.0.1:3478", true},
		{"DERP_PORT_443_TCP_PROTO=tcp", true},
		{"DERP_STUN_SERVICE_PORT_HTTPS=443", true},
		{"DERP_STUN_SERVICE_HOST=10.0.0.1", true},
		{"DERP_ENV_PATH=/bin", true},
		{"DERP_NAME=/relay/derp", true},
		{"DERP_NODE_NAME=a", false},
		{"DERP_REGION_NAME=a", false},
		{"DERP_DEBUG_LOGS=1", false},
	} {
		c := good(t, tt.pair)
		if ignored := len(c.Warnings) > 0; ignored != tt.ignored {
			t.Errorf("%s: warnings %q", tt.pair, c.Warnings)
		}
	}
	if _, err := Load(append(base(t.TempDir()), "DERP_PORTS=443")); err == nil {
		t.Error("DERP_PORTS is taken for a variable of Docker or Kubernetes")
	}
}

func TestSuggestion(t *testing.T) {
	known := map[string]bool{"DERP_AB": false, "DERP_AC": false, "DERP_LONGER": true}
	for name, want := range map[string]string{
		"DERP_AD":          "; did you mean DERP_AB?", // the first of two that are as near
		"DERP_AC_FILES":    "; did you mean DERP_AC_FILE?",
		"DERP_LONG":        "; did you mean DERP_LONGER?",
		"DERP_LONGERabc":   "; did you mean DERP_LONGER?",
		"DERP_LONGERabcd":  "; `derpd env` lists all variables",
		"DERP_HOST":        "; here it is DERP_DOMAIN",
		"DERP_CERTS":       "; here it is DERP_CERT_DIR",
		"DERP_SOMETHING_X": "; `derpd env` lists all variables",
	} {
		equal(t, name, suggestion(name, known), want)
	}
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "", 3}, {"", "abc", 3}, {"kitten", "sitting", 3}, {"ab", "ba", 2}, {"abc", "abd", 1}, {"abc", "ac", 1}} {
		equal(t, tt.a+", "+tt.b, distance(tt.a, tt.b), tt.want)
	}
}

// A variable that Kubernetes injects does not stand in the way of its file.
func TestFileBesideInjected(t *testing.T) {
	dir := t.TempDir()
	file("port", "3479")(t, dir)
	equal(t, "STUN", good(t, "DERP_STUN_PORT=udp://10.0.0.1:3478", "DERP_STUN_PORT_FILE="+dir+"/port").Listen.STUN, ":3479")
}

// Problems have the order of the documentation, and unknown variables come first.
// Each is one line.
func TestOrderOfProblems(t *testing.T) {
	p := new(problems)
	for i, name := range []string{"DERP_B", "DERP_Z", "DERP_A_FILE", "DERP_A", "DERP_Y", "DERP_B"} {
		p.add(name, "%d\r\nline", i)
	}
	var got []string
	for line := range strings.SplitSeq(p.err(map[string]int{"DERP_A": 0, "DERP_B": 1}).Error(), "\n") {
		got = append(got, line)
	}
	equal(t, "order", got, []string{
		`DERP_Y: 4\r\nline`, `DERP_Z: 1\r\nline`, `DERP_A_FILE: 2\r\nline`, `DERP_A: 3\r\nline`, `DERP_B: 0\r\nline`, `DERP_B: 5\r\nline`,
	})
	cause := errors.New("cause")
	p.add("DERP_A", "%w", cause)
	if !errors.Is(p.err(nil), cause) {
		t.Error("the cause is lost")
	}
	if err := new(problems).err(nil); err != nil {
		t.Errorf("no problem is %v", err)
	}
}

// The last of two values counts, as for a process; also if it is empty.
func TestRepeatedVariable(t *testing.T) {
	equal(t, "last", good(t, "DERP_REGION_NAME=a", "DERP_REGION_NAME=b").Region.Node.RegionName, "b")
	equal(t, "empty", good(t, "DERP_REGION_NAME=a", "DERP_REGION_NAME=").Region.Node.RegionName, "derpd")
	equal(t, "no value", good(t, "DERP_REGION_NAME").Region.Node.RegionName, "derpd")
	equal(t, "two =", good(t, "DERP_REGION_NAME=a=b").Region.Node.RegionName, "a=b")
}

// A credential of a DNS provider in a file that cannot be read is one problem.
func TestUnreadableFiles(t *testing.T) {
	dir := t.TempDir()
	for _, env := range []string{
		"DERP_DOMAIN=a.example.com DERP_DNS_PROVIDER=desec DERP_DNS_DESEC_TOKEN_FILE=",
		"DERP_MESH_WITH=b.example.com DERP_MESH_KEY_FILE=",
		"DERP_DOMAIN=a.example.com DERP_ACME_EAB_KID=kid DERP_ACME_EAB_KEY_FILE=",
		"DERP_DOMAIN=a.example.com DERP_ACME_EAB_KEY=c2Vj DERP_ACME_EAB_KID_FILE=",
		"DERP_TAILNET_OAUTH_CLIENT_ID=a DERP_TAILNET_OAUTH_CLIENT_SECRET_FILE=",
		"DERP_CERT_MODE=letsencrypt DERP_DOMAIN_FILE=",
		"DERP_VERIFY_CLIENT_URL_FAIL_OPEN=true DERP_VERIFY_CLIENT_URL_FILE=",
		"DERP_PROXY_PROTOCOL=true DERP_TRUSTED_PROXIES_FILE=",
		"DERP_DOMAIN=a.example.com DERP_DNS_DELEGATE=b.example.com DERP_DNS_PROVIDER_FILE=",
	} {
		name := env[strings.LastIndex(env, " ")+1 : len(env)-1]
		_, err := Load(append(base(dir), strings.Fields(env+filepath.Join(dir, "none"))...))
		if want := name + ": open " + dir + "/none: no such file or directory; create it, or correct the path (for a container: its path inside)"; fmt.Sprint(err) != want {
			t.Errorf("%s: %v, want %s", env, err, want)
		}
	}
}

// A secret in the place of a path, or an API key in the wrong variable, is not
// shown.
func TestMisplacedSecrets(t *testing.T) {
	const secret = "s3cretMarker"
	for _, env := range []string{
		"DERP_MESH_KEY_FILE=" + secret,
		"DERP_TAILNET_API_KEY_FILE=tskey-api-" + secret,
		"DERP_VERIFY_CLIENT_URL=user:" + secret + "@h/verify",
		"DERP_VERIFY_CLIENT_URL=http://user:1," + secret + "@h/verify",
		"DERP_TAILNET_API_URL=tskey-api-" + secret,
		"DERP_TAILNET_OAUTH_CLIENT_ID=tskey-client-" + secret,
	} {
		c, err := Load(append(base(t.TempDir()), env))
		name, _, _ := strings.Cut(env, "=")
		if text := fmt.Sprint(err); !strings.Contains(text, strings.TrimSuffix(name, "_ID")) {
			t.Errorf("%s: %v", env, err)
		} else if strings.Contains(text+shown(t, c), secret) {
			t.Errorf("%s is shown: %v\n%s", env, err, shown(t, c))
		}
	}
	_, err := Load(append(base(t.TempDir()), "DERP_MESH_KEY_FILE=key", "DERP_MESH_WITH=b.example.com"))
	if want := "DERP_MESH_KEY_FILE: want the absolute path of a file that holds the secret, got something else"; fmt.Sprint(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// Any environment has an answer, the same each time: a configuration, or problems
// that each name a variable, without a secret.
func FuzzLoad(f *testing.F) {
	for _, tt := range badConfigurations {
		f.Add(strings.ReplaceAll(tt.env, " ", "\x01"))
	}
	f.Add("DERP_MESH_KEY=a,a\x01DERP_ACME_EAB_KEY=!")
	f.Add("DERP_\n\r%s=1\x01DERP_DOMAIN_FILE=/\n/x\x01DERP_REGION_NAME=\x00\xff")
	f.Add("DERP_DOMAIN=a.example.com\x01DERP_DNS_PROVIDER=rfc2136\x01DERP_DNS_RFC2136_KEY=\"a\"")
	dir := f.TempDir()
	secrets := make(map[string]bool)
	for _, v := range readEnvironment(nil, new(problems)).variables() {
		secrets[v.Name] = v.Secret()
	}
	f.Fuzz(func(t *testing.T, text string) {
		env := append(base(dir), strings.Split(text, "\x01")...)
		for _, pair := range env {
			if strings.Contains(pair, "_FILE=") && strings.Contains(pair, "/dev/") || strings.Contains(pair, "/proc/") {
				t.Skip("a file without an end")
			}
		}
		const secret = "s3cretMarker"
		for i, pair := range env {
			if name, _, _ := strings.Cut(pair, "="); secrets[name] {
				env[i] = pair + secret
			}
		}
		c, err := Load(env)
		if c == nil {
			t.Fatal("no configuration")
		}
		_, again := Load(env)
		if fmt.Sprint(err) != fmt.Sprint(again) {
			t.Errorf("%v, and then %v", err, again)
		}
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if name, _, found := strings.Cut(line, ": "); !found || !strings.HasPrefix(name, "DERP_") && name != "RAILWAY_TCP_PROXY_DOMAIN" {
					t.Errorf("a problem without a variable: %q", line)
				}
			}
		}
		if all := fmt.Sprint(err) + shown(t, c); strings.Contains(all, secret) {
			t.Errorf("a secret is shown:\n%s", all)
		}
	})
}
