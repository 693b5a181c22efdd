package derpmap

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tailscale/hujson"
	"go.yaml.in/yaml/v3"
	"tailscale.com/tailcfg"
)

var nodes = map[string]Node{
	"all defaults": {RegionID: 900, RegionCode: "derpd", RegionName: "derpd", Name: "900a", HostName: "derp.example.com", Port: 443, STUNPort: 3478, HTTPPort: 80},
	"pinned on an address": {
		RegionID: 901, RegionCode: "sha", RegionName: "Shanghai", Name: "901a", HostName: "203.0.113.7", CertName: "sha256-raw:" + strings.Repeat("ab", 32),
		IPv4: "203.0.113.7", IPv6: None, Port: 8443, STUNPort: 3479, HTTPPort: 80,
	},
	"no STUN, no IPv4": {RegionID: 999, RegionCode: "x", RegionName: `quote " and # and 中`, Name: "999a", HostName: "2001:db8::7", IPv4: None, IPv6: "2001:db8::7", Port: 443, STUNPort: -1, HTTPPort: 80},
}

// Every format, read as its reader reads it, is the same map.
func TestFormatsRoundTrip(t *testing.T) {
	for name, n := range nodes {
		want := New(n)
		notes := []string{"a note", "and another one"}
		read := map[string]func([]byte) (*tailcfg.DERPMap, error){
			"json": func(out []byte) (*tailcfg.DERPMap, error) {
				var m tailcfg.DERPMap
				return &m, json.Unmarshal(out, &m)
			},
			"policy": func(out []byte) (*tailcfg.DERPMap, error) {
				standard, err := hujson.Standardize(out)
				if err != nil {
					return nil, err
				}
				var policy struct {
					DERPMap tailcfg.DERPMap `json:"derpMap"`
				}
				return &policy.DERPMap, json.Unmarshal(standard, &policy)
			},
			// Headscale decodes into tailcfg.DERPMap, and yaml's names of
			// the fields are in lower case.
			"headscale": func(out []byte) (*tailcfg.DERPMap, error) {
				var m tailcfg.DERPMap
				dec := yaml.NewDecoder(bytes.NewReader(out))
				dec.KnownFields(true)
				return &m, dec.Decode(&m)
			},
		}
		for _, format := range Formats {
			out, err := Format(format, want, notes)
			if err != nil {
				t.Fatal(err)
			}
			if format != "json" && !strings.Contains(string(out), "and another one") {
				t.Errorf("%s, %s: the notes are missing", name, format)
			}
			if strings.Contains(strings.ToLower(string(out)), "insecure") {
				t.Errorf("%s, %s: a map for people holds InsecureForTests", name, format)
			}
			got, err := read[format](out)
			if err != nil {
				t.Errorf("%s, %s: %v in\n%s", name, format, err, out)
			} else if !reflect.DeepEqual(got, want) {
				t.Errorf("%s, %s: got %+v", name, format, got.Regions)
			}
		}
	}
}

func TestNew(t *testing.T) {
	node := func(name string) *tailcfg.DERPNode {
		for _, r := range New(nodes[name]).Regions {
			return r.Nodes[0]
		}
		return nil
	}
	if n := node("all defaults"); n.DERPPort != 0 || n.STUNPort != 0 || n.CanPort80 {
		t.Errorf("defaults are zeros in a map, and port 80 is asked by address only: %+v", n)
	}
	if n := node("pinned on an address"); n.DERPPort != 8443 || n.STUNPort != 3479 || !n.CanPort80 || n.IPv6 != "none" || n.RegionID != 901 {
		t.Errorf("got %+v", n)
	}
	if n := node("no STUN, no IPv4"); n.STUNPort != -1 || n.CanPort80 {
		t.Errorf("got %+v", n)
	}
	other := nodes["pinned on an address"]
	other.HTTPPort = 8080
	if n := New(other).Regions[901].Nodes[0]; n.CanPort80 {
		t.Errorf("port 8080 is called 80: %+v", n)
	}
}

// The nodes of a region have distinct names, and their order does not depend on
// the order of the arguments.
func TestNewWithSeveralNodes(t *testing.T) {
	node := func(name, host string) Node {
		return Node{RegionID: 900, Name: name, HostName: host, Port: 443, STUNPort: 3478, HTTPPort: 80}
	}
	for _, tt := range []struct {
		nodes []Node
		want  string
	}{
		{[]Node{node("900a", "b"), node("900a", "a"), node("900a", "c")}, "900a a, 900b b, 900c c"},
		{[]Node{node("900b", "a"), node("900a", "b")}, "900a b, 900b a"},
		{[]Node{node("900a", "a"), node("900a", "b"), node("900b", "c")}, "900a a, 900b c, 900c b"},
		{[]Node{node("900a", "a"), node("900a", "a"), node("900a", "b")}, "900a a, 900b b"},
		{[]Node{node("sha", "b"), node("sha", "a")}, "900a b, sha a"},
	} {
		for range 2 {
			var got []string
			for _, n := range New(tt.nodes...).Regions[900].Nodes {
				got = append(got, n.Name+" "+n.HostName)
			}
			if got := strings.Join(got, ", "); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			slices.Reverse(tt.nodes)
		}
	}
	var many []Node
	for i := range 30 {
		many = append(many, node("900a", strconv.Itoa(i)))
	}
	names := make(map[string]bool)
	for _, n := range New(many...).Regions[900].Nodes {
		names[n.Name] = true
	}
	if len(names) != len(many) {
		t.Errorf("%d names for %d nodes", len(names), len(many))
	}
	for _, name := range []string{"900a", "900z", "900a1", "900d1"} {
		if !names[name] {
			t.Errorf("no node is called %s", name)
		}
	}
	if many[0] != node("900a", "0") {
		t.Errorf("an argument was changed: %+v", many[0])
	}
	// Nodes on one host differ by their ports.
	ports := []Node{node("900a", "a"), node("900a", "a")}
	ports[1].Port = 8443
	region := New(ports...).Regions[900]
	if len(region.Nodes) != 2 || region.Nodes[0].DERPPort != 0 || region.Nodes[1].DERPPort != 8443 || region.Nodes[1].Name != "900b" {
		t.Errorf("got %+v", region.Nodes)
	}
	if name := DefaultNodeName(900); name != "900a" {
		t.Errorf("the default name is %s", name)
	}
}

// The formats stay as they are, byte for byte: operators compare the printed map
// with the one in their policy.
func TestFormatsStay(t *testing.T) {
	m := New(
		Node{RegionID: 901, RegionCode: "sha", RegionName: "Shanghai 上海", Name: "901b", HostName: "b.example.com", CertName: "c.example.com", IPv4: "203.0.113.8", IPv6: "2001:db8::8", Port: 8443, STUNPort: -1, HTTPPort: 80},
		Node{RegionID: 901, RegionCode: "other", RegionName: "Other", Name: "901a", HostName: "a.example.com", Port: 443, STUNPort: 3479, HTTPPort: -1},
		Node{RegionID: 901, RegionCode: "other", RegionName: "Other", Name: "901c", HostName: "203.0.113.9", IPv4: "203.0.113.9", IPv6: None, Port: 443, STUNPort: 3478, HTTPPort: 8080},
	)
	for _, format := range Formats {
		got, err := Format(format, m, []string{"a note", "another note"})
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata", format))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%s\nwant\n%s", format, got, want)
		}
	}
	_, err := Format("xml", m, nil)
	if want := `want one of policy, headscale, json, got "xml"`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
