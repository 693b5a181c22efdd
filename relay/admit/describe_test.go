package admit

import (
	"context"
	"encoding/binary"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"go4.org/mem"
	"tailscale.com/client/local"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// The gate describes a node by the first source that knows it, without a question.
func TestDescribe(t *testing.T) {
	listed, both, none := newNode(), newNode(), newNode()
	keys, err := ParseKeys(listed.String() + "\n" + both.String() + " #  my nas # old \n")
	if err != nil {
		t.Fatal(err)
	}
	quiet := Source{Name: "quiet", Ask: func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) { panic("asked") }}
	other := quiet
	other.Describe = func(node key.NodePublic) (Description, bool) {
		return Description{Name: "nas.example"}, node == both || node == none
	}
	g := &Gate{config: Config{Sources: []Source{quiet, Keys(keys), other}}}
	for node, want := range map[key.NodePublic]Description{
		listed: {}, both: {Comment: "my nas # old"}, none: {Name: "nas.example"}, newNode(): {},
	} {
		if got := g.Describe(node); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if got := (Description{Name: "phone.tail1234.ts.net"}).Domain(); got != "tail1234.ts.net" {
		t.Errorf("domain %q", got)
	}
}

// A device of the tailnet has the name and the tags of the API.
func TestDescribeDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newNode()
		for _, tailnet := range []string{"", "amelie@example.com"} {
			a := &api{devices: always(http.StatusOK, list(device(node.String(), `,"tags":["tag:guest"]`)))}
			p := poll(t, a, func(c *TailnetConfig) { c.Tailnet = tailnet })
			want := Description{Name: "pangolin.tailfe8c.ts.net", Tailnet: tailnet, Tags: []string{"tag:guest"}}
			if got, ok := p.Describe(node); !ok || !reflect.DeepEqual(got, want) {
				t.Errorf("%+v, want %+v", got, want)
			}
			if _, ok := p.Describe(newNode()); ok {
				t.Error("describes a node that is not listed")
			}
		}
	})
}

// A node of tailscaled has the name and the tags of the last answer, until tailscaled
// no longer knows the node.
func TestDescribeTailscaled(t *testing.T) {
	known := true
	server := httptest.NewTestServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/localapi/v0/status":
			answer(w, http.StatusOK, online)
		case known:
			answer(w, http.StatusOK, `{"Node":{"Name":"phone.tail1234.ts.net.","Tags":["tag:guest"]}}`)
		default:
			http.Error(w, "no match for IP:port", http.StatusNotFound)
		}
	}))
	s := newTailscaled("", &local.Client{Transport: server.Client().Transport}, 0)
	node := newNode()
	ask := func() { _, _ = s.ask(t.Context(), node, netip.Addr{}) }
	if _, ok := s.described.of(node); ok {
		t.Error("described before it was asked about")
	}
	ask()
	want := Description{Name: "phone.tail1234.ts.net", Tags: []string{"tag:guest"}}
	if got, ok := s.described.of(node); !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	known = false
	ask()
	if _, ok := s.described.of(node); ok {
		t.Error("described after tailscaled has forgotten it")
	}
}

// The number of descriptions is limited.
func TestDescriptionsAreBounded(t *testing.T) {
	d := descriptions{nodes: make(map[key.NodePublic]Description)}
	for i := range maxDescriptions {
		d.nodes[key.NodePublicFromRaw32(rawKey(i))] = Description{}
	}
	node := newNode()
	d.keep(node, &tailcfg.Node{Name: "a."})
	d.keep(newNode(), nil)
	if got, ok := d.of(node); len(d.nodes) != maxDescriptions || !ok || got.Name != "a" {
		t.Errorf("%d descriptions, %+v", len(d.nodes), got)
	}
}

// rawKey returns the bytes of a key for a number.
func rawKey(i int) mem.RO {
	return mem.B(binary.BigEndian.AppendUint32(make([]byte, 28, 32), uint32(i)))
}
