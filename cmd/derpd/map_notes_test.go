package main

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// TestMapNotes asserts which notes `derpd derpmap` adds to the map, for the
// person who pastes it.
func TestMapNotes(t *testing.T) {
	notes := map[string]string{ // a part of each note
		"dns":      "up in DNS",
		"private4": "Set DERP_PUBLIC_IPV4 (or",
		"private6": "Set DERP_PUBLIC_IPV6 (or",
		"tls":      "must have a certificate for derp.example.com",
		"stun":     "STUNOnly true",
		"open":     "This relay is open",
		"mesh":     "DERP_MESH_WITH",
	}
	closed := "DERP_ALLOW_KEYS=" + key.NewNode().Public().String()
	public := "DERP_PUBLIC_IPV4=198.18.0.1"
	for name, tt := range map[string]struct {
		env  []string
		want []string
	}{
		"nothing to note":          {[]string{closed, public, "DERP_PUBLIC_IPV6=none"}, nil},
		"no address":               {[]string{closed}, []string{"dns"}},
		"IPv6 alone":               {[]string{closed, "DERP_PUBLIC_IPV6=2606:4700::1"}, nil},
		"a private IPv4 address":   {[]string{closed, "DERP_PUBLIC_IPV4=192.168.1.2"}, []string{"private4"}},
		"a carrier's address":      {[]string{closed, "DERP_PUBLIC_IPV4=100.64.1.2"}, []string{"private4"}},
		"a private IPv6 address":   {[]string{closed, public, "DERP_PUBLIC_IPV6=fd00::1"}, []string{"private6"}},
		"TLS ends in front":        {[]string{closed, public, "DERP_CERT_MODE=off"}, []string{"tls"}},
		"no STUN":                  {[]string{closed, public, "DERP_STUN=false"}, []string{"stun"}},
		"an open relay":            {[]string{public}, []string{"open"}},
		"open on order":            {[]string{public, "DERP_VERIFY_CLIENTS=false"}, []string{"open"}},
		"a mesh that is not asked": {[]string{closed, public, "DERP_MESH_WITH=other.example.com", "DERP_MESH_KEY=" + strings.Repeat("0123456789abcdef", 4)}, []string{"mesh"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			testkit.WritePair(t, dir+"/derp.example.com.crt", dir+"/derp.example.com.key", testkit.SelfSigned(t, "derp.example.com"))
			env := testkit.Environ(t, append([]string{"DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6=", "DERP_STUN_PORT=3478", "DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com", "DERP_CERT_DIR=" + dir}, tt.env...)...)
			ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
			defer cancel()
			var out strings.Builder
			if err := run(ctx, time.Now(), []string{"derpmap"}, testkit.LastOfEach(env), &out, io.Discard); err != nil {
				t.Fatal(err)
			}
			for note, text := range notes {
				if got, want := strings.Contains(out.String(), text), slices.Contains(tt.want, note); got != want {
					t.Errorf("the note %q (%s) is there: %t, want %t:\n%s", text, note, got, want, out.String())
				}
			}
		})
	}
}

// TestFirstAddressOfTheDomains asserts that the map has the first address of each
// family in DERP_DOMAIN.
func TestFirstAddressOfTheDomains(t *testing.T) {
	env := testkit.Environ(t, "DERP_PUBLIC_IPV4=", "DERP_PUBLIC_IPV6=", "DERP_HTTP_PORT=80", "DERP_CERT_MODE=letsencrypt",
		"DERP_DOMAIN=198.18.0.2,2606:4700::2,198.18.0.3,2606:4700::3")
	var out strings.Builder
	if err := run(t.Context(), time.Now(), []string{"derpmap", "--format", "json"}, testkit.LastOfEach(env), &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"IPv4": "198.18.0.2"`, `"IPv6": "2606:4700::2"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the map lacks %s:\n%s", want, out.String())
		}
	}
}
