package derpmap

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/tailscale/hujson"
	"go.yaml.in/yaml/v3"
	"tailscale.com/tailcfg"
)

// Formats are the names of the formats.
var Formats = []string{"policy", "headscale", "json"}

// Format returns m in one of Formats. The notes are for the person who pastes
// the map. They become comments, and are dropped from JSON.
func Format(format string, m *tailcfg.DERPMap, notes []string) ([]byte, error) {
	switch format {
	case "policy":
		return policy(m, notes)
	case "headscale":
		return headscale(m, notes)
	case "json":
		out, err := json.MarshalIndent(m, "", "  ")
		return append(out, '\n'), err
	}
	return nil, fmt.Errorf("want one of %s, got %q", strings.Join(Formats, ", "), format)
}

// policyMap is tailcfg.DERPMap, but always contains OmitDefaultRegions, because
// operators search for that key.
type policyMap struct {
	OmitDefaultRegions bool
	Regions            map[tailcfg.DERPRegionID]*tailcfg.DERPRegion
}

func policy(m *tailcfg.DERPMap, notes []string) ([]byte, error) {
	value, err := json.Marshal(policyMap{m.OmitDefaultRegions, m.Regions})
	if err != nil {
		return nil, err
	}
	var doc bytes.Buffer
	doc.WriteString("{\n")
	comment(&doc, "//", append([]string{
		"For Tailscale: admin console, Access controls, JSON editor.",
		`Put "derpMap" beside the other sections of the policy file.`,
	}, notes...))
	doc.WriteString("\"derpMap\": {\n")
	comment(&doc, "//", []string{
		"Keep false: Tailscale's own relays stay as the fallback when this one",
		"is down. With true, a single relay is a single point of failure.",
	})
	// The opening brace is already written.
	doc.Write(value[1:])
	doc.WriteString("}")
	parsed, err := hujson.Parse(doc.Bytes())
	if err != nil {
		return nil, err
	}
	parsed.Format()
	return parsed.Pack(), nil
}

// The yaml types mirror tailcfg's. Headscale decodes the file into
// tailcfg.DERPMap, so the keys are the field names in lower case.
type (
	yamlMap struct {
		Regions map[tailcfg.DERPRegionID]yamlRegion `yaml:"regions"`
	}
	yamlRegion struct {
		RegionID   tailcfg.DERPRegionID `yaml:"regionid"`
		RegionCode string               `yaml:"regioncode"`
		RegionName string               `yaml:"regionname"`
		Nodes      []yamlNode           `yaml:"nodes"`
	}
	yamlNode struct {
		Name      string               `yaml:"name"`
		RegionID  tailcfg.DERPRegionID `yaml:"regionid"`
		HostName  string               `yaml:"hostname"`
		CertName  string               `yaml:"certname,omitempty"`
		IPv4      string               `yaml:"ipv4,omitempty"`
		IPv6      string               `yaml:"ipv6,omitempty"`
		STUNPort  int                  `yaml:"stunport,omitempty"`
		DERPPort  int                  `yaml:"derpport,omitempty"`
		CanPort80 bool                 `yaml:"canport80,omitempty"`
	}
)

func headscale(m *tailcfg.DERPMap, notes []string) ([]byte, error) {
	out := yamlMap{Regions: make(map[tailcfg.DERPRegionID]yamlRegion, len(m.Regions))}
	for id, r := range m.Regions {
		region := yamlRegion{RegionID: r.RegionID, RegionCode: r.RegionCode, RegionName: r.RegionName}
		for _, n := range r.Nodes {
			region.Nodes = append(region.Nodes, yamlNode{
				Name: n.Name, RegionID: n.RegionID, HostName: n.HostName, CertName: n.CertName,
				IPv4: n.IPv4, IPv6: n.IPv6, STUNPort: n.STUNPort, DERPPort: n.DERPPort, CanPort80: n.CanPort80,
			})
		}
		out.Regions[id] = region
	}
	var doc bytes.Buffer
	comment(&doc, "#", append([]string{
		"For Headscale: save as a file, and name it in config.yaml under derp.paths.",
		"Tailscale's own relays stay as the fallback while derp.urls names them.",
	}, notes...))
	enc := yaml.NewEncoder(&doc)
	enc.SetIndent(2)
	if err := enc.Encode(out); err != nil {
		return nil, err
	}
	return doc.Bytes(), enc.Close()
}

func comment(doc *bytes.Buffer, mark string, lines []string) {
	for _, line := range lines {
		fmt.Fprintf(doc, "%s %s\n", mark, line)
	}
}
